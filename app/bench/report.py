"""What a load test found: figures, the verdict, and both in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.bench.load import OK, Plan, Sample

LIMIT_MS = 100.0
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

Figures = dict[str, float | None]

_BARS = 12
_BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one load test. Latencies are of the requests that were answered; a failure has none.

    Attributes:
        target, body: What was asked, and how.
        windows_per_request: Windows in each request.
        plan: What was planned.
        total_requests, succeeded: Requests that were due, and answered well.
        total_time_s: From the start to the last answer.
        latency_ms: `average`, `p50` to `p99.9` and `max`; None where nothing succeeded.
        late_ms: The same of how late requests were sent, in the open loop: the client's own share.
        window_ms: The same of computing one window from bars.
        errors: Failures by HTTP status or code.
        served_by: Successes by who answered.
    """

    target: str
    body: str
    windows_per_request: int
    plan: Plan
    total_requests: int
    succeeded: int
    total_time_s: float
    latency_ms: Figures
    late_ms: Figures | None
    window_ms: Figures
    errors: dict[str, int]
    served_by: dict[str, int]

    @property
    def throughput_rps(self) -> float:
        """Successes per second: failures are no throughput."""
        return self.succeeded / self.total_time_s if self.total_time_s > 0 else 0.0

    @property
    def meets_requirements(self) -> bool:
        """Average, p95 and p99 under 100 ms, and nothing failed."""
        figures = [self.latency_ms[name] for name in ("average", "p95", "p99")]
        return self.succeeded == self.total_requests > 0 and all(ms is not None and ms < LIMIT_MS for ms in figures)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "total_requests": self.total_requests,
            "total_time_seconds": self.total_time_s,
            "average_latency_ms": self.latency_ms["average"],
            "p95_latency_ms": self.latency_ms["p95"],
            "p99_latency_ms": self.latency_ms["p99"],
            "throughput_rps": self.throughput_rps,
            "concurrency": self.plan.concurrency,
            "meets_requirements": self.meets_requirements,
            "succeeded": self.succeeded,
            "errors": self.errors,
            "latency_ms": self.latency_ms,
            "target": self.target,
            "body": self.body,
            "windows_per_request": self.windows_per_request,
            "rate_rps": self.plan.rate_rps,
            "late_ms": self.late_ms,
            "served_by": self.served_by,
            "window_from_bars_ms": self.window_ms,
        }


def summarise(
    samples: Sequence[Sample],
    plan: Plan,
    total_time_s: float,
    *,
    target: str,
    body: str,
    windows_per_request: int,
    window_times_s: npt.NDArray[np.float64],
) -> Report:
    """Turn samples into figures."""
    good = [sample for sample in samples if sample.outcome.code == OK]
    return Report(
        target=target,
        body=body,
        windows_per_request=windows_per_request,
        plan=plan,
        total_requests=len(samples),
        succeeded=len(good),
        total_time_s=total_time_s,
        latency_ms=describe_ms([sample.latency_s for sample in good]),
        late_ms=None if plan.rate_rps is None else describe_ms([sample.late_s for sample in samples]),
        window_ms=describe_ms(window_times_s),
        errors=dict(Counter(sample.outcome.code for sample in samples if sample.outcome.code != OK)),
        served_by=dict(Counter(sample.outcome.served_by or "not told" for sample in good)),
    )


def describe_ms(seconds: Sequence[float] | npt.NDArray[np.float64]) -> Figures:
    """Average, percentiles and maximum in milliseconds; None each where there is nothing to describe."""
    names = ["average", *(f"p{q:g}" for q in PERCENTILES), "max"]
    if len(seconds) == 0:
        return dict.fromkeys(names)
    ms = 1e3 * np.asarray(seconds)
    values = [ms.mean(), *np.percentile(ms, PERCENTILES), ms.max()]
    return dict(zip(names, map(float, values), strict=True))


def render(report: Report, samples: Sequence[Sample]) -> Group:
    """The figures for the terminal; the last line is the verdict."""
    plan = report.plan
    loop = "closed loop" if plan.rate_rps is None else f"open loop, {plan.rate_rps:g} requests/s due"
    head = f"{report.target}, {loop}, {plan.concurrency} callers, windows per request: {report.windows_per_request}, "
    head += f"{report.body} body" if report.target == "http" else "one handle call per request, nothing coalesced"
    latencies = Table("ms", *report.latency_ms, box=box.SIMPLE)
    latencies.add_row("latency", *map(_ms, report.latency_ms.values()))
    if report.late_ms is not None:
        latencies.add_row("sent late", *map(_ms, report.late_ms.values()))
    latencies.add_row("from bars", *map(_ms, report.window_ms.values()))
    failed = ", ".join(f"{code}: {count}" for code, count in sorted(report.errors.items())) or "none"
    served_by = ", ".join(f"{arm} {count}" for arm, count in sorted(report.served_by.items())) or "nobody"
    lines = (
        f"Requests: {report.total_requests}, answered by {served_by}; failed: {failed}",
        f"Time: {report.total_time_s:.2f} s; throughput: {report.throughput_rps:.1f} requests/s "
        f"({report.throughput_rps * report.windows_per_request:.1f} windows/s), failures not counted",
        f"Meets Requirements: {report.meets_requirements}",
    )
    good = [1e3 * sample.latency_s for sample in samples if sample.outcome.code == OK]
    return Group(Text(head), latencies, *map(Text, histogram(good)), *map(Text, lines))


def histogram(latencies_ms: Sequence[float]) -> list[str]:
    """Lines with a bar each: how many latencies lie in each of a dozen ranges, even on a logarithmic scale."""
    if not latencies_ms:
        return []
    low, high = min(latencies_ms), max(latencies_ms)
    edges = np.geomspace(max(low, 1e-3), max(high, low * 1.1, 2e-3), _BARS + 1)
    counts, _ = np.histogram(np.clip(latencies_ms, edges[0], edges[-1]), edges)
    return [
        f"{start:9.2f} to {stop:8.2f} ms {_bar(count / counts.max())} {count}"
        for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _bar(share: float) -> str:
    eighths = round(8 * _BAR_WIDTH * share)
    bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return f"{bar:{_BAR_WIDTH}}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
