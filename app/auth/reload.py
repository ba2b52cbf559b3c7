"""What the sources of keys share: a task that runs beside the requests, and a record of what came of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

_LOGGER = logging.getLogger(__name__)

_PAUSE_S = 1.0

Outcome = Literal["taken", "refused", "dropped"]


class Background:
    """A coroutine in a task of its own, from `start` to `stop`.

    Args:
        run: Runs until it is cancelled. A fault that it did not foresee is logged and it is run again: keys that are
            never looked at any more would go unnoticed until one has to be taken away.
    """

    def __init__(self, run: Callable[[], Awaitable[None]]) -> None:
        self._run = run
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._run()
            except Exception:
                _LOGGER.exception("looking for keys failed; it goes on")
            await asyncio.sleep(_PAUSE_S)


class SourceRecord:
    """What one source of keys gave last, and whether it fails now.

    Args:
        what: Keys of what: `tokens` or `api_keys`; or `denied`, for ids of tokens.
        count: Told every outcome: `what`, `taken`, `refused` or `dropped`, and how many are in force.

    Attributes:
        generation: How many sets were taken.
    """

    def __init__(self, what: str, count: Callable[[str, Outcome, int], None]) -> None:
        self.generation = 0
        self._what = what
        self._count = count
        self._size = 0
        self._fault: str | None = None

    def take(self, size: int) -> None:
        """A new set is in force."""
        self.generation += 1
        self._size = size
        _LOGGER.info("keys (%s): %d in force, generation %d", self._what, size, self.generation)
        self.mend()
        self._count(self._what, "taken", size)

    def mend(self) -> None:
        """The source answers, with what is in force already or with something new."""
        self._fault = None

    def refuse(self, fault: str) -> None:
        """The source failed or gave what is no good; what was in force stays so. Logged when the fault is a new one.

        Args:
            fault: Why, without any part of a key.
        """
        if fault != self._fault:
            _LOGGER.error("keys (%s): %s; the %d in force stay", self._what, fault, self._size)
        self._fault = fault
        self._count(self._what, "refused", self._size)

    def drop(self, reason: str) -> None:
        """Nothing is in force any more, though something was."""
        _LOGGER.error("keys (%s): the %d in force count no longer: %s", self._what, self._size, reason)
        self._size = 0
        self._count(self._what, "dropped", 0)

    def document(self) -> dict[str, Any]:
        """For `/stats`."""
        return {"keys": self._size, "generation": self.generation, "failing": self._fault is not None}
