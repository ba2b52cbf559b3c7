"""How late the event loop is: what blocks it makes every caller wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_PERIOD_S = 0.1


class LoopLag:
    """Asks to be woken ten times a second and measures by how much that is late.

    Args:
        observe: Takes each lag, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(self, observe: Callable[[float], None], *, clock: Callable[[], float]) -> None:
        self._observe = observe
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._measure())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _measure(self) -> None:
        while True:
            due = self._clock() + _PERIOD_S
            await asyncio.sleep(_PERIOD_S)
            self._observe(max(0.0, self._clock() - due))
