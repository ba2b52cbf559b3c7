"""The replica's queue: whatever waits when the model becomes free is its next batch.

There is no timer. At low load a call finds the model free and waits for nothing; at high load batches grow by
themselves, because more arrives during each forward pass. Groups are counted in windows, not in calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from serve_app.contract import (
    DeadlineExceeded,
    FloatArray,
    ModelFailed,
    Options,
    Overloaded,
    Prediction,
    ServingError,
)

logger = logging.getLogger(__name__)


class Model(Protocol):
    """What the queue needs of an engine."""

    def predict(self, windows: FloatArray, options: Options) -> Prediction: ...


@dataclass(eq=False, slots=True)
class _Job:
    """A call on its way: windows before `taken` have left the queue, `answers` are theirs, in order."""

    model: Model
    windows: FloatArray
    options: Options
    deadline: float
    arrived: float
    outcome: asyncio.Future[Prediction]
    taken: int = 0
    answers: list[Prediction] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.windows) - self.taken

    def fits(self, other: _Job) -> bool:
        return self.model is other.model and self.options == other.options

    def accept(self, answer: Prediction) -> None:
        self.answers.append(answer)
        if sum(map(len, self.answers)) == len(self.windows) and not self.outcome.done():
            # The last slice's times add up to the whole wait: while earlier ones ran, it waited.
            joined = Prediction.join(self.answers)
            self.outcome.set_result(
                replace(joined, model_time_ms=answer.model_time_ms, batch_wait_ms=answer.batch_wait_ms)
            )

    def expire(self, now: float) -> None:
        if self.deadline <= now:
            self.fail(DeadlineExceeded("the deadline passed before the model was free"))

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class _Slice(NamedTuple):
    """Consecutive windows of one job, in one batch."""

    job: _Job
    start: int
    stop: int

    @property
    def windows(self) -> FloatArray:
        return self.job.windows[self.start : self.stop]


class DrainQueue:
    """Runs a model, one batch at a time, and feeds it with all that fits from what waits.

    Calls with the same model and options share a batch; a call larger than the room in a batch is split and put
    together again. The model is named by each call, so that a call keeps the version that it came for while
    versions change. For one event loop.

    Args:
        max_batch_windows: Most windows of one forward pass.
        max_queue_windows: Most windows that wait.
        inline_windows: Batches up to this size run on the event loop itself, larger ones on a thread. On a quiet
            machine the two changes of thread cost more than the loop misses in one small forward pass. Nothing else
            happens meanwhile: what hangs there shows as a process that does not answer, not in `stalled_s`.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        max_batch_windows: int,
        max_queue_windows: int,
        inline_windows: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch_windows = max_batch_windows
        self._max_queue_windows = max_queue_windows
        self._inline_windows = inline_windows
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._jobs: deque[_Job] = deque()
        self._running_windows = 0
        self._draining: asyncio.Task[None] | None = None
        self._progress_at = clock()
        self._load = _TimeAverage(clock)

    @property
    def waiting_windows(self) -> int:
        return sum(job.left for job in self._jobs)

    @property
    def stalled_s(self) -> float:
        """Seconds since the model last finished a batch while there was work for it; 0 when there is none."""
        return self._clock() - self._progress_at if self._draining else 0.0

    def mean_windows(self) -> float:
        """Windows waiting and running, averaged over the time since this was last asked."""
        return self._load.take()

    async def predict(self, model: Model, windows: FloatArray, options: Options, *, deadline: float) -> Prediction:
        """Answer one call; cancelling it gives its place back.

        Args:
            model: The engine that shall answer.
            windows: float32[B,F,T], validated.
            options: What was asked for.
            deadline: Seconds on the queue's clock after which nobody waits for the answer.

        Raises:
            Overloaded: The queue is full.
            DeadlineExceeded: The deadline passed first; what had not started was not run.
            ModelFailed: The forward pass raised, for this call by itself too.
            ServingError: What the model raised of that kind.
        """
        now = self._clock()
        if now >= deadline:
            raise DeadlineExceeded("the deadline had passed when the call arrived")
        if self.waiting_windows + len(windows) > self._max_queue_windows:
            raise Overloaded("too many windows wait at the model")
        job = _Job(model, windows, options, deadline, now, asyncio.get_running_loop().create_future())
        self._enqueue(job)
        try:
            async with asyncio.timeout(deadline - now):
                return await job.outcome
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed at the model") from None
        finally:
            self._forget(job)

    def close(self) -> None:
        """End the model's thread after the batch it runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, job: _Job) -> None:
        self._jobs.append(job)
        if self._draining is None:
            self._progress_at = self._clock()
            self._draining = asyncio.create_task(self._drain())
        self._update_load()

    def _forget(self, job: _Job) -> None:
        job.outcome.cancel()
        if job.left and job in self._jobs:
            self._jobs.remove(job)
        self._update_load()

    async def _drain(self) -> None:
        try:
            while batch := self._take():
                self._running_windows = sum(len(part.windows) for part in batch)
                await self._answer(batch)
                self._running_windows = 0
                self._update_load()
                await self._breathe()
        finally:
            self._draining = None

    async def _breathe(self) -> None:
        """A forward pass is over: answers and health checks go before the next, which may run on this very loop."""
        self._progress_at = self._clock()
        await asyncio.sleep(0)

    def _take(self) -> list[_Slice]:
        """The next batch: the oldest call, and from the others that fit it as many windows as there is room for."""
        self._drop_expired()
        batch: list[_Slice] = []
        room = self._max_batch_windows
        for job in self._jobs:
            if room and job.fits(self._jobs[0]):
                count = min(room, job.left)
                batch.append(_Slice(job, job.taken, job.taken + count))
                job.taken += count
                room -= count
        self._jobs = deque(job for job in self._jobs if job.left)
        return batch

    def _drop_expired(self) -> None:
        now = self._clock()
        for job in self._jobs:
            job.expire(now)
        self._jobs = deque(job for job in self._jobs if not job.outcome.done())

    async def _answer(self, batch: list[_Slice]) -> None:
        started = self._clock()
        try:
            answer = await self._forward(batch)
        except ServingError as error:  # the model has tried what there is to try, and says what came of it
            for part in batch:
                part.job.fail(type(error)(error.detail))
            return
        except Exception:
            await self._answer_singly(batch)
            return
        row = 0
        for part in batch:
            rows = answer.rows(row, row := row + len(part.windows))
            part.job.accept(replace(rows, batch_wait_ms=(started - part.job.arrived) * 1000))

    async def _forward(self, batch: list[_Slice]) -> Prediction:
        job = batch[0].job
        windows = batch[0].windows if len(batch) == 1 else np.concatenate([part.windows for part in batch])
        if len(windows) <= self._inline_windows:
            answer = job.model.predict(windows, job.options)
        else:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._thread, job.model.predict, windows, job.options)
        if len(answer) != len(windows):
            raise RuntimeError(f"the engine answered {len(answer)} of {len(windows)} windows")
        return answer

    async def _answer_singly(self, batch: list[_Slice]) -> None:
        """After a batch has failed: once more by single calls, so that a bad one fails alone."""
        if len(batch) > 1:
            for part in batch:
                await self._breathe()
                part.job.expire(self._clock())
                if not part.job.outcome.done():
                    await self._answer([part])
            return
        logger.exception("the forward pass failed on %d windows", len(batch[0].windows))
        batch[0].job.fail(ModelFailed("the model failed on these windows"))

    def _update_load(self) -> None:
        self._load.set(self.waiting_windows + self._running_windows)


class _TimeAverage:
    """A level, averaged over time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._level = 0.0
        self._area = 0.0
        self._since = self._changed_at = clock()

    def set(self, level: float) -> None:
        now = self._clock()
        self._area += self._level * (now - self._changed_at)
        self._level, self._changed_at = level, now

    def take(self) -> float:
        self.set(self._level)
        elapsed = self._changed_at - self._since
        mean = self._area / elapsed if elapsed > 0 else self._level
        self._area, self._since = 0.0, self._changed_at
        return mean
