"""The door: one credential per request, one answer for every failure, a limit of failures per address."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.auth import FAILURES, ApiKeyVerifier, Door, FailureLimit, Key, KeySet, Principal, make_key
from app.auth.api_keys import ApiKeys
from app.auth.door import address_of, bearer_credential
from app.errors import TooManyFailures, Unauthenticated
from app.observability.ledger import Ledger
from tests.app.auth.signing import CLAIMS, HEADER, NOW, Clock, claims_with, ec_key, issue, key_of, sign, verifier_of

GOOD = sign(HEADER, CLAIMS)


def scope_of(credential: str | None, client: Any = ("192.0.2.1", 1)) -> dict[str, Any]:
    headers = [] if credential is None else [(b"authorization", f"Bearer {credential}".encode("latin-1"))]
    scope: dict[str, Any] = {"type": "http", "headers": headers, "client": client}
    Ledger(lambda: 0.0).open(scope)
    return scope


class DoorUnderTest:
    """A door with a clock moved by hand, what it counted, and what its look for new keys shall find."""

    def __init__(self, per_minute: int = 10, **options: Any) -> None:
        self.now = 1000.0
        self.failures: list[str] = []
        self.looks = 0
        self.found: dict[str | None, Key] = {}
        self.hanging: asyncio.Event | None = None
        self.credential, key = make_key(Principal("script"), b"p" * 48, now=NOW, lifetime_s=None)
        api_keys = ApiKeyVerifier(Clock())
        api_keys.replace(ApiKeys({key.id: key}, b"p" * 48))
        self.tokens = verifier_of(Clock(), options.pop("keys", None))
        limit = FailureLimit(per_minute, clock=lambda: self.now, **options)
        self.door = Door(self.tokens, api_keys, limit=limit, count_failure=self.failures.append, renew=self._look)

    async def _look(self) -> bool:
        self.looks += 1
        if self.hanging is not None:
            await self.hanging.wait()
        if self.found:
            self.tokens.replace_keys(KeySet(self.found))
        return bool(self.found)

    async def status(self, credential: str | None, client: Any = ("192.0.2.1", 1)) -> int:
        try:
            await self.door.admit(scope_of(credential, client))
        except (Unauthenticated, TooManyFailures) as error:
            return error.status
        return 200


async def test_tokens_and_api_keys_both_open() -> None:
    under_test = DoorUnderTest()
    assert (await under_test.door.admit(scope_of(GOOD))).subject == "desk-7"
    assert (await under_test.door.admit(scope_of(under_test.credential))).subject == "script"
    assert under_test.failures == []


async def test_the_eleventh_failure_of_a_minute_is_told_to_wait_and_a_valid_credential_is_not() -> None:
    under_test = DoorUnderTest()
    guess = "gk_aaaaaaaa_" + "A" * 43
    assert [await under_test.status(guess) for _ in range(12)] == [401] * 10 + [429] * 2
    assert await under_test.status("nonsense") == 429
    assert await under_test.status(GOOD) == 200
    assert await under_test.status(under_test.credential) == 200
    assert await under_test.status(guess, ("192.0.2.2", 1)) == 401


async def test_a_refusal_says_when_the_next_attempt_is_worth_it() -> None:
    under_test = DoorUnderTest()
    for _ in range(10):
        await under_test.status("x")
    with pytest.raises(TooManyFailures) as refusal:
        await under_test.door.admit(scope_of("x"))
    assert refusal.value.headers == {"Retry-After": "6"}
    under_test.now += 6
    assert [await under_test.status("x") for _ in range(2)] == [401, 429]
    under_test.now += 3600
    assert [await under_test.status("x") for _ in range(11)] == [401] * 10 + [429]


async def test_a_request_without_any_credential_tries_nothing_and_is_not_counted_against_its_address() -> None:
    under_test = DoorUnderTest()
    assert [await under_test.status(None) for _ in range(50)] == [401] * 50
    assert await under_test.status("x") == 401
    assert under_test.failures == ["missing"] * 50 + ["malformed"]


@pytest.mark.parametrize(
    ("credential", "reason"),
    [
        (None, "missing"),
        ("x", "malformed"),
        ("gk_x", "malformed"),
        ("gk_aaaaaaaa_" + "A" * 43, "api_key"),
        (sign(HEADER, CLAIMS, b"x" * 32), "signature"),
        (sign(HEADER | {"kid": "k9"}, CLAIMS), "key"),
        (sign(HEADER, claims_with(aud="other")), "claims"),
        (sign(HEADER, claims_with(exp=NOW - 60, iat=NOW - 120)), "expired"),
    ],
)
async def test_why_is_for_our_books_and_the_answer_is_always_the_same(credential: str | None, reason: str) -> None:
    under_test = DoorUnderTest()
    scope = scope_of(credential)
    with pytest.raises(Unauthenticated) as refusal:
        await under_test.door.admit(scope)
    plain = Unauthenticated()
    assert (refusal.value.detail, refusal.value.headers) == (plain.detail, plain.headers)
    assert under_test.failures == [reason]
    assert reason in FAILURES
    assert Ledger.of(scope).facts == {"credential": reason}


async def test_each_address_has_its_own_count_and_the_table_is_bounded() -> None:
    under_test = DoorUnderTest(per_minute=1, max_addresses=3)
    clients = [(f"192.0.2.{number}", 1) for number in range(4)]
    assert [await under_test.status("x", client) for client in clients] == [401] * 4
    assert await under_test.status("x", clients[3]) == 429
    assert await under_test.status("x", clients[1]) == 429
    assert await under_test.status("x", clients[0]) == 401  # the one not seen for longest was forgotten


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.1", 5), "192.0.2.1"),
        (("127.0.0.1", 5), "127.0.0.1"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::"),
        (("2001:db8:1:2::9", 5), "2001:db8:1:2::"),
        (("2001:db8:1:3::9", 5), "2001:db8:1:3::"),
        (("::ffff:192.0.2.1", 5), "192.0.2.1"),
        (("fe80::1%eth0", 5), "fe80::"),
        (("::1", 5), "::"),
        (None, "local"),
        (("", 0), "local"),
        (("/run/sluice.sock", 0), "local"),
    ],
)
def test_what_counts_as_one_address(client: Any, address: str) -> None:
    assert address_of({"client": client}) == address


async def test_a_token_of_a_new_key_waits_for_the_look_and_then_counts() -> None:
    under_test = DoorUnderTest(keys={"old": key_of(ec_key("old"))})
    token = issue(ec_key("new"), "new")
    assert await under_test.status(token) == 401
    under_test.found = {"new": key_of(ec_key("new"))}
    assert [await under_test.status(token) for _ in range(2)] == [200, 200]
    assert under_test.looks == 2


async def test_a_token_of_a_new_key_counts_from_an_address_that_has_failed_too_often_too() -> None:
    under_test = DoorUnderTest(keys={"old": key_of(ec_key("old"))})
    assert [await under_test.status("x") for _ in range(12)] == [401] * 10 + [429] * 2
    token = issue(ec_key("new"), "new")
    assert await under_test.status(token) == 429
    under_test.found = {"new": key_of(ec_key("new"))}
    assert await under_test.status(token) == 200


async def test_a_look_that_hangs_keeps_few_strangers_and_everybody_who_has_not_failed_too_often() -> None:
    under_test = DoorUnderTest(keys={"old": key_of(ec_key("old"))})
    for _ in range(10):
        await under_test.status("x")
    under_test.hanging = asyncio.Event()
    token = issue(ec_key("new"), "new")
    strangers = [asyncio.create_task(under_test.status(token)) for _ in range(200)]
    other = asyncio.create_task(under_test.status(token, ("192.0.2.2", 1)))
    await asyncio.sleep(0)
    assert (under_test.looks, sum(task.done() for task in strangers)) == (65, 200 - 64)
    under_test.found = {"new": key_of(ec_key("new"))}
    under_test.hanging.set()
    assert [await task for task in strangers] == [200] * 64 + [429] * 136
    assert await other == 200
    under_test.hanging = None
    assert await under_test.status(token) == 200  # their places are free again


@pytest.mark.parametrize(
    "values",
    [[b""], [b"Basic abc"], [b"Bearer a", b"Bearer a"], [b"Bearer " + b"a" * 5000], [b"abc"], [b"Bearer\tabc"]],
)
def test_only_one_bearer_header_counts(values: list[bytes]) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        bearer_credential(values)
    assert refusal.value.reason == "malformed"


def test_the_scheme_s_case_does_not_matter() -> None:
    assert bearer_credential([b"bEARER abc"]) == "abc"


@settings(deadline=None)
@given(per_minute=st.integers(1, 10_000), burst=st.integers(1, 50))
def test_as_many_failures_as_were_set_pass_at_once_whatever_the_number(per_minute: int, burst: int) -> None:
    limit = FailureLimit(per_minute, clock=lambda: 12345.678)
    passed = sum(limit.spend("a") == 0.0 for _ in range(min(per_minute, 400) + burst))
    assert passed == min(per_minute, min(per_minute, 400) + burst)
