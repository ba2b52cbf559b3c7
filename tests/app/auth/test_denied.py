"""Tokens that are refused before their time: the list, the file it comes from, and what it does to a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.auth import DeniedFile, TokenVerifier
from app.auth.denied import MAX_DENIED_BYTES, read_denied
from app.errors import IdentityUnavailable, Unauthenticated
from tests.app.auth.signing import HEADER, NOW, Clock, claims_with, sign, verifier_of

LEAKED = sign(HEADER, claims_with(jti="leaked"))
OTHER = sign(HEADER, claims_with(jti="leaked-not"))
NAMELESS = sign(HEADER, claims_with())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(clock: Clock) -> TokenVerifier:
    return verifier_of(clock)


def test_a_denied_token_counts_no_longer_though_it_was_verified_before(verifier: TokenVerifier) -> None:
    verifier.verify(LEAKED)
    verifier.replace_denied(read_denied(b"leaked\n"))
    for _ in range(2):
        with pytest.raises(Unauthenticated) as caught:
            verifier.verify(LEAKED)
        assert caught.value.reason == "denied"
    for token in (OTHER, NAMELESS):
        verifier.verify(token)
    verifier.replace_denied({})
    verifier.verify(LEAKED)


def test_a_token_is_denied_at_its_first_look_too(verifier: TokenVerifier) -> None:
    verifier.replace_denied(read_denied(b"leaked"))
    with pytest.raises(Unauthenticated):
        verifier.verify(LEAKED)


def test_a_line_with_a_time_means_nothing_from_then_on(verifier: TokenVerifier, clock: Clock) -> None:
    verifier.replace_denied(read_denied(f"leaked {NOW + 60}".encode()))
    clock.now = NOW + 59.9
    with pytest.raises(Unauthenticated):
        verifier.verify(LEAKED)
    clock.now = NOW + 60.0
    verifier.verify(LEAKED)


def test_while_nobody_knows_what_is_denied_no_token_is_judged(verifier: TokenVerifier) -> None:
    verifier.verify(LEAKED)
    verifier.replace_denied(None)
    for token in (LEAKED, OTHER):
        with pytest.raises(IdentityUnavailable):
            verifier.verify(token)
    with pytest.raises(Unauthenticated):
        verifier.verify(LEAKED[:-1])


def test_a_list_has_comments_empty_lines_and_ids_of_every_kind() -> None:
    text = "# desk 7, stolen\n\n  a-1  \nurn:uuid:7f\t1800000000\n\u00fcber\r\na-1\n"
    assert set(read_denied(text.encode())) == {"a-1", "urn:uuid:7f", "\u00fcber"}
    assert read_denied(b"") == {}


@pytest.mark.parametrize(
    "line",
    [
        *("a b", "a 1 2", "a -1", "a 1.5", "a 1e9", "a 99999999999999999999", "x" * 256, "a\0b"),
        "a \u0661",  # a digit, and none of ours
    ],
)
def test_a_line_that_says_something_else_refuses_the_list_and_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 ") as caught:
        read_denied(f"good\n{line}\n".encode())
    assert line not in str(caught.value)


async def test_a_changed_list_counts_and_a_damaged_one_leaves_the_last_good(
    tmp_path: Path, verifier: TokenVerifier
) -> None:
    path = tmp_path / "denied"
    path.write_text("")
    path.chmod(0o644)
    outcomes: list[tuple[str, str, int]] = []
    source = DeniedFile(path, verifier.replace_denied, lambda *outcome: outcomes.append(outcome))
    source.load()
    verifier.verify(LEAKED)
    with path.open("a") as file:
        file.write("leaked\n")
    assert await source.renew()
    with pytest.raises(Unauthenticated):
        verifier.verify(LEAKED)
    for damage in (b"\xff\xfe", b"two words", b"x\n" * MAX_DENIED_BYTES):
        path.write_bytes(damage)
        assert not await source.renew()
    path.unlink()
    assert not await source.renew()
    with pytest.raises(Unauthenticated):
        verifier.verify(LEAKED)
    assert outcomes[1:3] == [("denied", "taken", 1), ("denied", "refused", 1)]
