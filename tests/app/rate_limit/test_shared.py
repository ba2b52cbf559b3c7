"""When Redis is asked and waited for; what a real Redis does is among the integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from app.rate_limit import Quota
from app.rate_limit.memory import LocalLimiter, MinuteCounters
from app.rate_limit.shared import MAX_BUNDLE, MAX_LATE, MAX_WAITING, SharedCounters, SharedLimiter, Spent
from app.shared.commands import Command, RedisAway

NEW = [1, 1, 61_000, b"61000:1"]


class FakeLink:
    """A Redis that admits everything, when it is told to answer."""

    def __init__(self) -> None:
        self.bundles: list[int] = []
        self.failure: RedisAway | None = None
        self.answers_now = True
        self._answering = asyncio.Event()

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        self.bundles.append(len(commands))
        if self.failure is not None:
            raise self.failure
        if not self.answers_now:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._answering.wait()
            except TimeoutError:
                raise RedisAway("TimeoutError") from None
        return [list(NEW) for _ in commands]

    async def close(self) -> None: ...

    def hang(self) -> None:
        self.answers_now = False
        self._answering.clear()

    def answer(self) -> None:
        self.answers_now = True
        self._answering.set()


@pytest.fixture
async def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
async def counters(link: FakeLink) -> AsyncIterator[SharedCounters]:
    counters = SharedCounters(link, timeout_s=10, doubt_after_s=5, probe_period_s=0.01)
    await counters.start()
    link.bundles.clear()
    yield counters
    await counters.stop()


async def test_what_is_asked_meanwhile_goes_with_the_next_bundle(counters: SharedCounters, link: FakeLink) -> None:
    link.hang()
    first = asyncio.create_task(counters.spend("a", 10, 1))
    await asyncio.sleep(0)
    others = [asyncio.create_task(counters.spend("a", 10, 1)) for _ in range(20)]
    await asyncio.sleep(0)
    link.answer()
    assert None not in await asyncio.gather(first, *others)
    assert link.bundles == [1, 20]


async def test_when_a_bundle_takes_long_all_but_a_few_are_let_go_and_nobody_new_waits(link: FakeLink) -> None:
    counters = SharedCounters(link, timeout_s=10, doubt_after_s=0.01)
    link.hang()
    waiting = [asyncio.create_task(counters.spend("a", 10, 1)) for _ in range(20)]
    done, late = await asyncio.wait(waiting, timeout=0.2)
    assert len(late) == MAX_LATE
    assert {task.result() for task in done} == {None}
    assert await counters.spend("a", 10, 1) is None
    assert link.bundles == [20]
    link.answer()
    await asyncio.gather(*late)
    assert not counters.is_away
    assert await counters.spend("a", 10, 1) is not None


async def test_after_a_failure_redis_is_left_alone_until_it_answers_probes(
    counters: SharedCounters, link: FakeLink
) -> None:
    link.failure = RedisAway("ConnectionError")
    assert await counters.spend("a", 10, 1) is None
    assert counters.is_away
    asked = len(link.bundles)
    assert {await counters.spend("a", 10, 1) for _ in range(50)} == {None}
    assert len(link.bundles) == asked
    await asyncio.sleep(0.05)
    assert counters.is_away
    link.failure = None
    async with asyncio.timeout(1):
        while counters.is_away:
            await asyncio.sleep(0.001)
    assert await counters.spend("a", 10, 1) is not None


async def test_so_many_wait_and_no_more(counters: SharedCounters, link: FakeLink) -> None:
    link.hang()
    under_way = asyncio.create_task(counters.spend("a", 10, 1))
    while not link.bundles:
        await asyncio.sleep(0)
    waiting = [asyncio.create_task(counters.spend("a", 10, 1)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    assert await counters.spend("a", 10, 1) is None
    link.answer()
    assert None not in await asyncio.gather(under_way, *waiting)
    assert link.bundles == [1, *[MAX_BUNDLE] * (MAX_WAITING // MAX_BUNDLE)]


async def test_who_waited_long_for_the_bundles_of_others_is_let_go(link: FakeLink) -> None:
    now = 100.0
    counters = SharedCounters(link, timeout_s=10, doubt_after_s=5, clock=lambda: now)
    link.hang()
    bundle = [asyncio.create_task(counters.spend("a", 10, 1)) for _ in range(MAX_BUNDLE)]
    behind = [asyncio.create_task(counters.spend("a", 10, 1)) for _ in range(2 * MAX_BUNDLE)]
    while not link.bundles:
        await asyncio.sleep(0)
    now += 4
    later = asyncio.create_task(counters.spend("a", 10, 1))
    await asyncio.sleep(0)
    now += 1.5
    link.answer()
    assert None not in await asyncio.gather(*bundle, later)
    assert {await one for one in behind} == {None}
    assert link.bundles == [MAX_BUNDLE, 1]
    await counters.stop()


async def test_a_caller_who_leaves_spoils_nothing_for_the_others(counters: SharedCounters, link: FakeLink) -> None:
    link.hang()
    tasks = [asyncio.create_task(counters.spend("a", 10, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    link.answer()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert None not in results[1:]


async def test_who_waits_at_the_end_is_let_go(link: FakeLink) -> None:
    counters = SharedCounters(link)
    await counters.start()
    link.hang()
    waiting = asyncio.create_task(counters.spend("a", 10, 1))
    await asyncio.sleep(0)
    await counters.stop()
    assert await waiting is None


async def test_what_redis_admitted_counts_when_it_is_away(counters: SharedCounters, link: FakeLink) -> None:
    limiter = SharedLimiter(
        counters, LocalLimiter(MinuteCounters(lambda: 0.0), quota=Quota(10), mode="local"), quota=Quota(20)
    )
    assert [(await limiter.spend("a", 1)).mode for _ in range(8)] == ["shared"] * 8
    link.failure = RedisAway("ConnectionError")
    allowances = [await limiter.spend("a", 1) for _ in range(4)]
    assert [allowance.admitted for allowance in allowances] == [True, True, False, False]
    assert {(allowance.mode, allowance.limit) for allowance in allowances} == {("local", 10)}
    assert allowances[0].headers()["X-RateLimit-Mode"] == "local"


@pytest.mark.parametrize(
    "answer", [None, 7, b"x", [], [1], [1, b"1", 0, b""], [1, -1, 0, b""], [2, 1, 0, b""], [1, 1, 1, b"1:1" * 2000]]
)
async def test_an_answer_that_makes_no_sense_is_nobody_s_exception(
    counters: SharedCounters, link: FakeLink, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    async def ask(commands: Sequence[Command], timeout_s: float) -> list[Any]:
        return [answer for _ in commands]

    monkeypatch.setattr(link, "ask", ask)
    assert await counters.spend("a", 10, 1) is None


async def test_who_had_spent_all_in_redis_gets_no_part_of_it_anew_until_it_would_have_faded(
    counters: SharedCounters, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(commands: Sequence[Command], timeout_s: float) -> list[Any]:
        if link.failure is not None:
            raise link.failure
        return [[0, 20, 30_000, b"30000:1,60000:19"] for _ in commands]

    monkeypatch.setattr(link, "ask", ask)
    now = 0.0
    local = LocalLimiter(MinuteCounters(lambda: now), quota=Quota(10), mode="local")
    limiter = SharedLimiter(counters, local, quota=Quota(20), clock=lambda: now)
    assert not (await limiter.spend("a", 1)).admitted
    link.failure = RedisAway("ConnectionError")
    refused = await limiter.spend("a", 1)
    assert (refused.admitted, refused.mode, refused.remaining, refused.reset_s) == (False, "local", 0, 30)
    assert (await limiter.spend("b", 1)).admitted  # of whom Redis told nothing
    now = 29.9
    assert not (await limiter.spend("a", 1)).admitted
    now = 30.1
    assert [(await limiter.spend("a", 1)).admitted for _ in range(2)] == [True, False]
    now = 95.0
    assert [(await limiter.spend("a", 1)).admitted for _ in range(11)] == [True] * 10 + [False]


async def test_an_account_with_a_limit_of_its_own_has_it_in_redis_and_a_part_of_it_without(
    counters: SharedCounters, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def ask(commands: Sequence[Command], timeout_s: float) -> list[Any]:
        if link.failure is not None:
            raise link.failure
        asked.extend(commands)
        return [[1, 1, 30_000, b"30000:1"] for _ in commands]

    monkeypatch.setattr(link, "ask", ask)
    quota = Quota(20, {"large": 40})
    local = LocalLimiter(MinuteCounters(lambda: 0.0), quota=quota.divided(4), mode="local")
    limiter = SharedLimiter(counters, local, quota=quota)
    allowances = [await limiter.spend(account, 1) for account in ("large", "any")]
    assert [(allowance.limit, allowance.remaining) for allowance in allowances] == [(40, 39), (20, 19)]
    assert [40 in command.words for command in asked] == [True, False]
    link.failure = RedisAway("ConnectionError")
    assert [(await limiter.spend("large", 1)).admitted for _ in range(10)] == [True] * 9 + [False]  # one was spent


def test_what_redis_told_fades_as_it_does_there() -> None:
    spent = Spent(b"20000:30,61000:60", told_at=100.0)
    assert [spent.used(now) for now in (100.0, 119.9, 120.1)] == [90, 90, 60]
    assert (spent.wait_s(30, 130.0), spent.wait_s(-1, 130.0)) == (31.0, 60)
    spent.add(5, 130.0)
    assert [spent.used(now) for now in (130.0, 161.1, 190.1)] == [65, 5, 0]


@pytest.mark.parametrize("text", [b"", b"x", b"1:2:3", b"1:x", b",,"])
def test_what_redis_never_told_so_counts_for_nothing(text: bytes) -> None:
    assert Spent(text, told_at=0.0).used(0.0) == 0
