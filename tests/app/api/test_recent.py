from __future__ import annotations

import asyncio

import pytest

from app.api.recent import Recent
from tests.app.under_test import FakeClock


class Question:
    """Counts how often it is asked; answers when it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> int:
        self.asked += 1
        await self.gate.wait()
        return self.asked


async def test_many_who_ask_at_once_are_one_question() -> None:
    question = Question()
    recent = Recent(question, keep_s=1.0, clock=FakeClock(0.0))
    assert await asyncio.gather(*(recent() for _ in range(100))) == [1] * 100


async def test_an_answer_is_kept_for_its_time_and_no_longer() -> None:
    question, clock = Question(), FakeClock(0.0)
    recent = Recent(question, keep_s=1.0, clock=clock)
    assert await recent() == 1
    clock.advance(0.9)
    assert await recent() == 1
    clock.advance(0.1)
    assert await recent() == 2


async def test_one_who_leaves_does_not_take_the_answer_from_the_others() -> None:
    question = Question()
    question.gate.clear()
    recent = Recent(question, keep_s=1.0, clock=FakeClock(0.0))
    leaving, staying = asyncio.create_task(recent()), asyncio.create_task(recent())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    question.gate.set()
    assert await staying == 1


async def test_a_failure_is_everybodys_and_not_forever() -> None:
    clock, calls = FakeClock(0.0), iter([ValueError("a"), ValueError("b")])

    async def fail() -> int:
        raise next(calls)

    recent = Recent(fail, keep_s=1.0, clock=clock)
    for _ in range(2):
        with pytest.raises(ValueError, match="a"):
            await recent()
    clock.advance(1.0)
    with pytest.raises(ValueError, match="b"):
        await recent()
