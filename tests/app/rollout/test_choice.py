import math

from hypothesis import given
from hypothesis import strategies as st

from app.rollout.choice import hash_principal, is_canary, position

KEY = b"k" * 32
shares = st.floats(0.0, 1.0)


@given(subject=st.text(), smaller=shares, larger=shares)
def test_who_was_moved_stays_moved_while_the_share_grows(subject: str, smaller: float, larger: float) -> None:
    smaller, larger = sorted((smaller, larger))
    principal = hash_principal(KEY, subject)
    assert is_canary(principal, larger) or not is_canary(principal, smaller)


@given(subject=st.text())
def test_share_zero_is_nobody_and_share_one_is_everybody(subject: str) -> None:
    principal = hash_principal(KEY, subject)
    assert not is_canary(principal, 0.0)
    assert is_canary(principal, 1.0)


def test_the_highest_hash_is_still_below_one() -> None:
    assert position("f" * 16) < 1.0


def test_the_share_of_callers_moved_is_the_share_asked_for() -> None:
    callers, share = 20_000, 0.05
    moved = sum(is_canary(hash_principal(KEY, f"desk-{number}"), share) for number in range(callers))
    assert abs(moved - callers * share) < 4 * math.sqrt(callers * share * (1 - share))


def test_another_key_deals_the_callers_anew() -> None:
    callers = [f"desk-{number}" for number in range(1000)]
    sides = [[is_canary(hash_principal(key, caller), 0.5) for caller in callers] for key in (KEY, b"other" * 6)]
    same = sum(a == b for a, b in zip(*sides, strict=True))
    assert 400 < same < 600
