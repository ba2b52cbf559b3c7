"""The assignment log's near side: what was answered to whom, taken on the request path and written by a thread.

To be called after the answer has been sent, for every answered request while a plan's experiment runs:

    experiment.record(request_id, principal, side, served)

It keeps references alone and takes about a microsecond. A thread converts and writes what has come, a few times a
second. Nothing waits for the disk: where it is slow, full or locked, requests are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from app.rollout.dispatch import Served
from app.rollout.evidence import Side
from app.rollout.experiment_log import Assignment, AssignmentLog

_LOGGER = logging.getLogger(__name__)

# Why requests are not in the log.
Loss = Literal["queue-full", "locked", "disk", "unforeseen"]

MAX_QUEUED_WINDOWS = 20_000
_PERIOD_S = 0.25
_PRUNE_LOOKS = 240  # once a minute
_STOP_TIMEOUT_S = 5.0
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


class Experiment:
    """Takes assignments on the event loop and writes them in a thread of its own.

    Args:
        log: Where they go; the thread alone writes assignments to it.
        count_loss: Told a reason and how many requests were dropped for it; from any thread.
        wall_clock: Seconds since the epoch.
        max_queued_windows: Most windows that wait to be written.

    Attributes:
        log: To label and to read.
    """

    def __init__(
        self,
        log: AssignmentLog,
        *,
        count_loss: Callable[[Loss, int], None],
        wall_clock: Callable[[], float] = time.time,
        max_queued_windows: int = MAX_QUEUED_WINDOWS,
    ) -> None:
        self.log = log
        self._count_loss = count_loss
        self._wall_clock = wall_clock
        self._max_queued_windows = max_queued_windows
        self._queue: deque[Assignment] = deque()
        # One is counted by the event loop alone and the other by the thread alone: neither needs a lock.
        self._taken_windows = 0
        self._written_windows = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        self._thread = threading.Thread(target=self._write_until_stopped, name="experiment", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Write what has come, as far as that takes a few seconds at most."""
        self._stopping.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)

    def record(self, request_id: str, principal: str, side: Side, served: Served, *, tag: str | None = None) -> None:
        """Note one answered request; returns at once and never raises.

        Args:
            request_id: Ours, by which its outcome is told later.
            principal: Keyed hash of who asked, never the subject.
            side: To which the caller belongs, whoever answered in the end.
            served: The answer; its arrays must not change any more.
            tag: Symbol tag of the request; cut to 64 characters.
        """
        prediction = served.answer.prediction
        taken = self._taken_windows + len(prediction)
        if taken - self._written_windows > self._max_queued_windows:
            self._count_loss("queue-full", 1)
            return
        self._taken_windows = taken
        at = self._wall_clock()
        self._queue.append(Assignment(request_id, at, side, served.arm.backend, principal, prediction, tag))

    def write(self) -> None:
        """Write what waits; by the thread, or by tests in its place."""
        if not self._queue:
            return
        batch = [self._queue.popleft() for _ in range(len(self._queue))]
        try:
            self.log.append(batch)
        except Exception as error:
            self._count_loss(_loss(error), len(batch))
            _LOGGER.warning("%d requests are missing from the experiment's log: %s", len(batch), error)
        finally:
            self._written_windows += sum(len(assignment.prediction) for assignment in batch)

    def prune(self) -> None:
        """Drop what has become too old, also when no experiment is made any more; by the thread."""
        try:
            self.log.prune()
        except Exception as error:
            _LOGGER.warning("what is too old stays in the experiment's log for now: %s", error)

    def _write_until_stopped(self) -> None:
        looks = 0
        while not self._stopping.wait(_PERIOD_S):
            self.write()
            if looks % _PRUNE_LOOKS == 0:
                self.prune()
            looks += 1
        self.write()
        self.log.close()


def _loss(error: Exception) -> Loss:
    if isinstance(error, sqlite3.DatabaseError):
        # The low byte of an extended code is the code itself.
        return "locked" if getattr(error, "sqlite_errorcode", 0) & 0xFF in _LOCKED else "disk"
    return "disk" if isinstance(error, OSError) else "unforeseen"
