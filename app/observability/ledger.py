"""Where one request's time went, and what became of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import Scope

# In the order of the request's way. All but `total` add up to it.
STAGES = ("auth", "decode", "limit", "queue", "transport", "batch", "model", "encode")

# The stage that begins when one is closed. A call that fails does not tell where: it was on its way.
_NEXT = {"auth": "decode", "decode": "limit", "limit": "transport", "encode": "encode"}

_SCOPE_KEY = "ledger"


class Ledger:
    """One request's account: its id, its stages and the facts for the access log.

    Args:
        clock: Monotonic seconds.

    Attributes:
        open_stage: The stage that the request is in; None for one that has no stages.
    """

    __slots__ = ("_clock", "_mark", "facts", "open_stage", "request_id", "stages_ms", "started_at")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.request_id = os.urandom(16).hex()
        self.started_at = self._mark = clock()
        self.stages_ms: dict[str, float] = {}
        self.open_stage: str | None = None
        self.facts: dict[str, Any] = {}

    @staticmethod
    def of(scope: Scope) -> Ledger:
        """The ledger that the middleware opened for this request."""
        ledger: Ledger = scope[_SCOPE_KEY]
        return ledger

    def open(self, scope: Scope) -> None:
        """Put the ledger where `of` finds it."""
        scope[_SCOPE_KEY] = self

    def close_stage(self, stage: str) -> None:
        """Book the time since the last mark on `stage`."""
        now = self._clock()
        self.stages_ms[stage] = 1e3 * (now - self._mark)
        self._mark = now
        self.open_stage = _NEXT[stage]

    def close_call(self, stages_ms: Mapping[str, float]) -> None:
        """Book the time since the last mark on the stages that a backend reports.

        What the backend did not see (the rollout's choice, an arm that failed before another answered) lies between
        gateway and model and is booked as transport, so that the stages add up to the total.
        """
        now = self._clock()
        waited_ms = 1e3 * (now - self._mark)
        self._mark = now
        for stage in ("queue", "batch", "model"):
            self.stages_ms[stage] = stages_ms.get(stage, 0.0)
        known_ms = sum(self.stages_ms[stage] for stage in ("queue", "batch", "model"))
        self.stages_ms["transport"] = max(0.0, waited_ms - known_ms)
        self.open_stage = "encode"

    def total_ms(self) -> float:
        """Milliseconds since the request arrived."""
        return 1e3 * (self._clock() - self.started_at)

    def server_timing(self) -> str:
        """The Server-Timing header (W3C Server Timing): every booked stage and the total, in milliseconds.

        The time since the last mark is booked on the open stage: that of an answer's writing, or of its refusal.
        """
        now = self._clock()
        if self.open_stage is not None:
            self.stages_ms[self.open_stage] = self.stages_ms.get(self.open_stage, 0.0) + 1e3 * (now - self._mark)
            self._mark = now
        stages = [f"{stage};dur={self.stages_ms[stage]:.3f}" for stage in STAGES if stage in self.stages_ms]
        return ", ".join([*stages, f"total;dur={1e3 * (now - self.started_at):.3f}"])
