"""A real inference on every backend every few seconds, in the background: what `/health` tells is always at hand."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from app.backends.base import Backend, Call
from serve_app.contract import N_FEATURES, N_STEPS, Options, ServingError
from serve_app.health import Health, Outcome, combine, judge

_log = logging.getLogger(__name__)

KEPT_OUTCOMES = 3  # what "recent" means to `judge`
IMPATIENT_PERIOD_S = 1.0  # while an arm does not answer, people wait to see it back


class Prober:
    """Asks each backend for one window's prediction and remembers how that went.

    Args:
        backends: The arms.
        period_s: Seconds between checks while all is well.
        timeout_s: Deadline of each inference.
        clock: Seconds, monotonic; the clock of the calls' deadlines.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        period_s: float = 5.0,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._backends = backends
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._outcomes: dict[str, deque[Outcome]] = {b.name: deque(maxlen=KEPT_OUTCOMES) for b in backends}
        self._window = np.random.default_rng(0).standard_normal((1, N_FEATURES, N_STEPS), dtype=np.float32)
        self._checking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._checking = asyncio.create_task(self._check_for_ever())

    async def stop(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    def report(self) -> dict[str, Any]:
        """The service's health and a row per arm, from memory.

        Returns:
            `status`, `latency_ms`, `last_check` (seconds since the epoch), `is_healthy`, `error` (a closed code or
            None), and `arms`: rows of the same with the arm's name.
        """
        now = self._clock()
        arms = {name: judge(outcomes, now=now) for name, outcomes in self._outcomes.items()}
        return {**_row(combine(arms.values())), "arms": [{"arm": name, **_row(arm)} for name, arm in arms.items()]}

    async def check(self) -> None:
        """Check every arm once, side by side."""
        await asyncio.gather(*(self._check(backend) for backend in self._backends))

    async def _check_for_ever(self) -> None:
        while True:
            await self.check()
            all_answer = all(outcomes[-1].error is None for outcomes in self._outcomes.values())
            await asyncio.sleep(self._period_s if all_answer else min(self._period_s, IMPATIENT_PERIOD_S))

    async def _check(self, backend: Backend) -> None:
        started = self._clock()
        call = Call(self._window, Options(), started + self._timeout_s, "health", "0" * 16)
        error = None
        try:
            await backend.predict(call)
        except ServingError as failure:
            error = failure.code
        except Exception:
            _log.exception("checking %s failed in an unforeseen way", backend.name)
            error = ServingError.code
        ended = self._clock()
        self._outcomes[backend.name].append(Outcome(ended, self._wall_clock(), ended - started, error))


def _row(health: Health) -> dict[str, Any]:
    return {
        "status": health.status,
        "latency_ms": health.latency_ms,
        "last_check": health.last_check,
        "is_healthy": health.is_healthy,
        "error": health.error,
    }
