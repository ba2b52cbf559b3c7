from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.rate_limit import Counters, SlidingWindowLimiter


class Clock:
    def __init__(self, now: float = 600.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limiter_of(clock: Clock, limit: int) -> SlidingWindowLimiter:
    return SlidingWindowLimiter(Counters(clock), limit=limit)


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


async def test_the_edge_of_a_window_does_not_double_the_limit() -> None:
    clock = Clock(659.0)  # one second before a fixed window ends
    limiter = limiter_of(clock, 100)
    await limiter.spend("a", 100)
    clock.now = 661.0
    admitted = sum([(await limiter.spend("a", 1)).admitted for _ in range(100)])
    assert admitted <= 3


async def test_after_two_quiet_windows_everything_is_back() -> None:
    clock = Clock(610.0)
    limiter = limiter_of(clock, 100)
    await limiter.spend("a", 100)
    clock.now = 731.0
    allowance = await limiter.spend("a", 100)
    assert allowance.admitted
    assert allowance.remaining == 0


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
async def test_waiting_as_told_is_enough_and_the_window_is_never_overspent(
    limit: int, steps: list[tuple[float, int]], cost: int
) -> None:
    clock = Clock()
    limiter = limiter_of(clock, limit)
    spent: dict[int, int] = {}  # by fixed window: in none of them more than the limit can have been admitted
    for pause_s, step_cost in steps:
        clock.now += pause_s
        if (await limiter.spend("a", step_cost)).admitted:
            spent[int(clock.now // 60)] = spent.get(int(clock.now // 60), 0) + step_cost
    assert all(total <= limit for total in spent.values())
    allowance = await limiter.spend("a", cost)
    if not allowance.admitted and cost <= limit:
        clock.now += allowance.reset_s
        assert (await limiter.spend("a", cost)).admitted


async def test_headers_follow_the_draft_s_syntax() -> None:
    allowance = await limiter_of(Clock(637.5), 600).spend("a", 188)
    assert allowance.headers() == {"RateLimit-Policy": '"predict";q=600;w=60', "RateLimit": '"predict";r=412;t=23'}
    for value in allowance.headers().values():
        assert re.fullmatch(r'"[a-z]+"(;[a-z]=\d+){2}', value)  # an item with parameters, RFC 8941


@pytest.mark.parametrize("quiet_windows", [2, 3, 1000])
async def test_counters_of_past_windows_are_dropped(quiet_windows: int) -> None:
    clock = Clock()
    counters = Counters(clock)
    limiter = SlidingWindowLimiter(counters, limit=10)
    for account in range(1000):
        await limiter.spend(str(account), 1)
    clock.now += 60 * quiet_windows
    await limiter.spend("a", 1)
    assert await counters.reset() == 1


async def test_remaining_is_what_can_still_be_spent() -> None:
    clock = Clock(659.0)
    limiter = limiter_of(clock, 100)
    await limiter.spend("a", 90)
    clock.now = 690.0  # the last window weighs half
    allowance = await limiter.spend("a", 5)
    assert allowance.remaining == 100 - math.floor(90 / 2 + 5)
    assert (await limiter.spend("a", allowance.remaining)).admitted
    assert not (await limiter.spend("a", 1)).admitted
