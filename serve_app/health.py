"""What healthy means, as arithmetic over the outcomes of recent real inferences. No clock, no input or output."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["healthy", "degraded", "unhealthy", "unknown"]

SLOW_S = 0.1  # the latency that the service promises
STALE_S = 30.0
FAILURES_TO_UNHEALTHY = 2  # one lost probe is a lost probe


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one inference went.

    Attributes:
        at: Seconds on a monotonic clock when it ended.
        wall_at: The same moment in seconds since the epoch, for people.
        latency_s: Seconds from asking to the answer or the failure.
        error: Code of the failure (`ServingError.code`), or None.
    """

    at: float
    wall_at: float
    latency_s: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """The state of one arm, or of all.

    Attributes:
        status: `healthy` answers in time; `degraded` answers, but slowly or not always; `unhealthy` does not
            answer; `unknown` was not asked lately.
        latency_ms: Median of the recent answers, None without one.
        last_check: Seconds since the epoch of the newest outcome, None without one.
        error: Code of the newest failure among the recent outcomes, None without one.
    """

    status: Status
    latency_ms: float | None = None
    last_check: float | None = None
    error: str | None = None

    @property
    def is_healthy(self) -> bool:
        return self.status == "healthy"


def judge(outcomes: Sequence[Outcome], *, now: float, slow_s: float = SLOW_S, stale_s: float = STALE_S) -> Health:
    """Judge an arm by its recent outcomes.

    Args:
        outcomes: Oldest first; the caller keeps as many as "recent" shall mean.
        now: Seconds on the clock of `Outcome.at`.
        slow_s: A median latency above this is degraded.
        stale_s: Outcomes older than this say nothing.
    """
    recent = [outcome for outcome in outcomes if now - outcome.at <= stale_s]
    if not recent:
        return Health("unknown", last_check=outcomes[-1].wall_at if outcomes else None)
    latencies = [outcome.latency_s for outcome in recent if outcome.error is None]
    latency_s = statistics.median(latencies) if latencies else None
    return Health(
        status=_status(recent, latency_s, slow_s),
        latency_ms=None if latency_s is None else latency_s * 1000,
        last_check=recent[-1].wall_at,
        error=next((outcome.error for outcome in reversed(recent) if outcome.error), None),
    )


def _status(recent: Sequence[Outcome], latency_s: float | None, slow_s: float) -> Status:
    last = recent[-FAILURES_TO_UNHEALTHY:]
    if latency_s is None or (len(last) == FAILURES_TO_UNHEALTHY and all(outcome.error for outcome in last)):
        return "unhealthy"
    if latency_s > slow_s or any(outcome.error for outcome in recent):
        return "degraded"
    return "healthy"


def combine(arms: Iterable[Health]) -> Health:
    """The state of a service that any one of its arms can carry.

    Healthy when all arms are, unhealthy when none answers, unknown when none was asked, else degraded. Latency is
    that of the fastest arm that answers.
    """
    rows = list(arms)
    latencies = [row.latency_ms for row in rows if row.latency_ms is not None and row.status != "unhealthy"]
    return Health(
        status=_combined({row.status for row in rows}),
        latency_ms=min(latencies, default=None),
        last_check=max((row.last_check for row in rows if row.last_check is not None), default=None),
        error=next((row.error for row in rows if row.error), None),
    )


def _combined(statuses: set[Status]) -> Status:
    if len(statuses) == 1:
        return statuses.pop()
    if statuses & {"healthy", "degraded"}:
        return "degraded"
    return "unhealthy" if "unhealthy" in statuses else "unknown"
