import math

import pytest
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


@pytest.mark.parametrize(
    ("key", "subject", "principal", "place"),
    [
        (bytes(range(32)), "sub:ann", "a653cea112d5cebb", 0.6497162955518753),
        (bytes(range(32)), "tenant:fünd-a", "5802c5c723398a05", 0.34379230605848055),
        (b"k" * 16, "sub:ann", "996c42225cfb78ce", 0.599308141126114),
        (bytes(range(64)), "", "59923de3c050f5ad", 0.34988772211392294),
    ],
)
def test_a_caller_has_the_same_place_in_every_process_and_release(
    key: bytes, subject: str, principal: str, place: float
) -> None:
    assert hash_principal(key, subject) == principal
    assert position(principal) == place
