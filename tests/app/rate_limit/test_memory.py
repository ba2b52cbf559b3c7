from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.rate_limit import Quota
from app.rate_limit.memory import LocalLimiter, MinuteCounters


class Clock:
    def __init__(self, now: float = 600.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limiter_of(clock: Clock, limit: int) -> LocalLimiter:
    return LocalLimiter(MinuteCounters(clock), quota=Quota(limit))


async def test_the_limit_is_admitted_exactly_and_then_no_more() -> None:
    limiter = limiter_of(Clock(), 100)
    admitted = [(await limiter.spend("a", 1)).admitted for _ in range(150)]
    assert admitted == [True] * 100 + [False] * 50


async def test_a_batch_costs_what_its_windows_cost_one_by_one() -> None:
    limiter = limiter_of(Clock(), 100)
    for _ in range(16):
        single = await limiter.spend("one-by-one", 1)
    batch = await limiter.spend("batch", 16)
    assert single.remaining == batch.remaining == 84


async def test_a_refused_request_spends_nothing() -> None:
    limiter = limiter_of(Clock(), 10)
    await limiter.spend("a", 8)
    for _ in range(50):
        assert not (await limiter.spend("a", 3)).admitted
    assert (await limiter.spend("a", 2)).admitted


async def test_accounts_do_not_share() -> None:
    limiter = limiter_of(Clock(), 10)
    await limiter.spend("a", 10)
    assert (await limiter.spend("b", 10)).admitted


@pytest.mark.parametrize("began", [600.0, 659.0, 659.9])
async def test_no_moment_of_the_clock_lets_twice_the_limit_through(began: float) -> None:
    clock = Clock(began)
    limiter = limiter_of(clock, 100)
    await limiter.spend("a", 100)
    while clock.now < began + 59.9:
        clock.now += 0.25
        assert not (await limiter.spend("a", 1)).admitted
    clock.now = began + 61
    assert (await limiter.spend("a", 100)).admitted


async def test_the_clock_s_own_past_is_not_needed() -> None:
    clock = Clock(0.0)
    limiter = limiter_of(clock, 10)
    assert (await limiter.spend("a", 10)).admitted
    assert not (await limiter.spend("a", 1)).admitted


async def test_more_than_the_whole_limit_is_never_admitted() -> None:
    allowance = await limiter_of(Clock(), 10).spend("a", 11)
    assert not allowance.admitted
    assert allowance.remaining == 10
    assert allowance.reset_s == 60


@given(
    limit=st.integers(1, 200),
    steps=st.lists(st.tuples(st.floats(0, 70), st.integers(1, 60)), max_size=30),
    cost=st.integers(1, 60),
)
async def test_no_minute_is_overspent_and_nobody_is_refused_what_the_last_61_seconds_left(
    limit: int, steps: list[tuple[float, int]], cost: int
) -> None:
    clock = Clock()
    limiter = limiter_of(clock, limit)
    spent: list[tuple[float, int]] = []

    def since(seconds: float) -> int:
        return sum(amount for moment, amount in spent if moment > clock.now - seconds)

    for pause_s, step_cost in steps:
        clock.now += pause_s
        admitted = (await limiter.spend("a", step_cost)).admitted
        assert not admitted or since(60) + step_cost <= limit
        assert admitted or since(61.001) + step_cost > limit
        if admitted:
            spent.append((clock.now, step_cost))
    allowance = await limiter.spend("a", cost)
    if not allowance.admitted and cost <= limit:
        clock.now += allowance.reset_s
        assert (await limiter.spend("a", cost)).admitted


async def test_headers_follow_the_draft_s_syntax() -> None:
    allowance = await limiter_of(Clock(637.5), 600).spend("a", 188)
    assert allowance.headers() == {"RateLimit-Policy": '"predict";q=600;w=60', "RateLimit": '"predict";r=412;t=61'}
    for value in allowance.headers().values():
        assert re.fullmatch(r'"[a-z]+"(;[a-z]=\d+){2}', value)  # an item with parameters, RFC 8941


@pytest.mark.parametrize("quiet_windows", [2, 3, 1000])
async def test_counters_of_past_windows_are_dropped(quiet_windows: int) -> None:
    clock = Clock()
    counters = MinuteCounters(clock)
    limiter = LocalLimiter(counters, quota=Quota(10))
    for account in range(1000):
        await limiter.spend(str(account), 1)
    clock.now += 60 * quiet_windows
    await limiter.spend("a", 1)
    assert await counters.reset() == 1


async def test_remaining_is_what_can_still_be_spent() -> None:
    clock = Clock(659.0)
    limiter = limiter_of(clock, 100)
    await limiter.spend("a", 90)
    clock.now = 690.0
    allowance = await limiter.spend("a", 5)
    assert (allowance.remaining, allowance.reset_s) == (5, 30)
    assert (await limiter.spend("a", allowance.remaining)).admitted
    assert not (await limiter.spend("a", 1)).admitted


async def test_what_was_admitted_elsewhere_counts() -> None:
    limiter = limiter_of(Clock(), 10)
    limiter.record("a", 8)
    assert not (await limiter.spend("a", 3)).admitted
    assert (await limiter.spend("a", 2)).admitted


async def test_an_account_with_a_limit_of_its_own_is_held_to_that_one() -> None:
    limiter = LocalLimiter(MinuteCounters(lambda: 0.0), quota=Quota(3, {"large": 5, "small": 1}))
    for account, limit in (("large", 5), ("small", 1), ("any", 3)):
        assert [(await limiter.spend(account, 1)).admitted for _ in range(6)] == [True] * limit + [False] * (6 - limit)
        assert (await limiter.spend(account, 1)).headers()["RateLimit-Policy"] == f'"predict";q={limit};w=60'


def test_a_part_of_a_quota_is_a_part_of_every_limit_in_it() -> None:
    part = Quota(100, {"large": 1000, "small": 2}).divided(4)
    assert [part.of(account) for account in ("any", "large", "small")] == [25, 250, 1]
