"""A real inference on every backend every few seconds, in the background: what `/health` tells is always at hand."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from app.backends.base import Answer, BackendStatus, Call
from serve_app.contract import N_FEATURES, N_STEPS, NotReady, Options, Overloaded, ServingError
from serve_app.health import Health, Outcome, combine, judge

_log = logging.getLogger(__name__)

KEPT_OUTCOMES = 3  # what "recent" means to `judge`
IMPATIENT_PERIOD_S = 0.5  # while an arm does not answer, people wait to see it back
LOOK_PERIOD_S = 0.1  # for an arm that does not want to wait so long


class Probed(Protocol):
    """An arm as the prober knows it."""

    name: str

    async def probe(self, call: Call) -> Answer:
        """Answer a call that no caller waits for. Raises `ServingError`."""

    def wants_probe(self) -> bool:
        """Whether the next probe should not wait for its turn."""

    def status(self) -> BackendStatus:
        """Whether it can answer now."""


class Prober:
    """Asks each backend for one window's prediction and remembers how that went.

    Args:
        arms: What is asked.
        period_s: Seconds between checks while all is well.
        timeout_s: Deadline of each inference.
        clock: Seconds, monotonic; the clock of the calls' deadlines.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self,
        arms: Sequence[Probed],
        *,
        period_s: float = 5.0,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._arms = arms
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._outcomes: dict[str, deque[Outcome]] = {arm.name: deque(maxlen=KEPT_OUTCOMES) for arm in arms}
        self._window = np.random.default_rng(0).standard_normal((1, N_FEATURES, N_STEPS), dtype=np.float32)
        self._checking: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._checking = [asyncio.create_task(self._check_for_ever(arm)) for arm in self._arms]

    async def stop(self) -> None:
        for checking in self._checking:
            checking.cancel()
        await asyncio.gather(*self._checking, return_exceptions=True)

    def report(self) -> dict[str, Any]:
        """The service's health and a row per arm, from memory.

        Returns:
            `status`, `latency_ms`, `last_check` (seconds since the epoch), `is_healthy`, `error` (a closed code or
            None), and `arms`: rows of the same with the arm's name.
        """
        arms = {arm.name: self._judge(arm) for arm in self._arms}
        return {**_row(combine(arms.values())), "arms": [{"arm": name, **_row(arm)} for name, arm in arms.items()]}

    def _judge(self, arm: Probed) -> Health:
        """By its last answers, unless it says itself that it cannot answer now."""
        health = judge(self._outcomes[arm.name], now=self._clock())
        if health.status in {"healthy", "degraded"} and not arm.status().ready:
            return replace(health, status="unhealthy", error=health.error or NotReady.code)
        return health

    async def check(self) -> None:
        """Check every arm once, side by side."""
        await asyncio.gather(*(self._check(arm) for arm in self._arms))

    async def _check_for_ever(self, arm: Probed) -> None:
        while True:
            await self._check(arm)
            outcomes = self._outcomes[arm.name]
            answers = not outcomes or outcomes[-1].error is None
            await self._pause(arm, self._period_s if answers else min(self._period_s, IMPATIENT_PERIOD_S))

    async def _pause(self, arm: Probed, pause_s: float) -> None:
        ends_at = self._clock() + pause_s
        while (left_s := ends_at - self._clock()) > 0:
            if arm.wants_probe():
                return
            await asyncio.sleep(min(left_s, LOOK_PERIOD_S))

    async def _check(self, arm: Probed) -> None:
        started = self._clock()
        call = Call(self._window, Options(), started + self._timeout_s, "health", "0" * 16)
        error = None
        try:
            await arm.probe(call)
        except Overloaded:
            return  # our own shedding says nothing of the arm
        except ServingError as failure:
            error = failure.code
        except Exception:
            _log.exception("checking %s failed in an unforeseen way", arm.name)
            error = ServingError.code
        ended = self._clock()
        self._outcomes[arm.name].append(Outcome(ended, self._wall_clock(), ended - started, error))


def _row(health: Health) -> dict[str, Any]:
    return {
        "status": health.status,
        "latency_ms": health.latency_ms,
        "last_check": health.last_check,
        "is_healthy": health.is_healthy,
        "error": health.error,
    }
