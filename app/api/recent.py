"""Answers that are asked for once, however many want them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The latest answer to one question, asked anew when it has grown old.

    Args:
        ask: The question; it has a deadline of its own.
        keep_s: Seconds for which an answer is good.
        clock: Monotonic seconds.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], *, keep_s: float, clock: Callable[[], float]) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._clock = clock
        self._asking: asyncio.Future[T] | None = None
        self._good_until = 0.0

    async def __call__(self) -> T:
        """The answer; whoever comes while it is being asked for waits for the same one."""
        if self._asking is None or (self._asking.done() and self._clock() >= self._good_until):
            self._asking = asyncio.ensure_future(self._answer())
        return await asyncio.shield(self._asking)  # one caller that leaves does not take it from the others

    async def _answer(self) -> T:
        try:
            return await self._ask()
        finally:
            self._good_until = self._clock() + self._keep_s
