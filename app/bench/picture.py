"""A load test as a picture: latency over time, and by percentile."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from app.bench.load import OK, Sample
from app.bench.report import LIMIT_MS, Report

_BLUE, _RED = "#1f5fa8", "#b3261e"
_TAIL = (0, 50, 90, 99, 99.9, 99.99)


def latency_picture(report: Report, samples: Sequence[Sample]) -> bytes:
    """PNG: every request at the time it was due, failures in red; and the latency that so many requests stay below."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    over_time, by_percentile = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_requests(over_time, samples)
    _draw_percentiles(by_percentile, [1e3 * sample.latency_s for sample in samples if sample.outcome.code == OK])
    # Of an axis without data matplotlib can make no logarithmic range; and the limit shall always be in sight.
    shown_ms = [LIMIT_MS, *(1e3 * sample.latency_s for sample in samples if sample.latency_s > 0)]
    over_time.set_ylim(min(shown_ms) / 1.5, max(shown_ms) * 1.5)
    for axis in (over_time, by_percentile):
        axis.axhline(LIMIT_MS, color="black", lw=1, ls=":")
        axis.grid(alpha=0.25)
    over_time.annotate(f"limit {LIMIT_MS:g} ms", (0.01, LIMIT_MS), xycoords=("axes fraction", "data"), va="bottom")
    loop = "closed loop" if report.plan.rate_rps is None else f"{report.plan.rate_rps:g} requests/s due"
    figure.suptitle(
        f"{report.target}, {loop}, {report.plan.concurrency} callers: {report.succeeded} of {report.total_requests} "
        f"answered, {report.throughput_rps:.0f} requests/s"
    )
    with io.BytesIO() as buffer, mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def _draw_requests(axis: Axes, samples: Sequence[Sample]) -> None:
    for is_ok, colour, label in ((True, _BLUE, "answered"), (False, _RED, "failed")):
        drawn = [sample for sample in samples if (sample.outcome.code == OK) is is_ok]
        if drawn:
            x, y = zip(*((sample.due_s, 1e3 * sample.latency_s) for sample in drawn), strict=True)
            axis.scatter(x, y, s=8, alpha=0.5, linewidths=0, color=colour, label=f"{label}: {len(drawn)}")
    axis.set(yscale="log", xlabel="due at, s", ylabel="latency, ms")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    if any(sample.outcome.code != OK for sample in samples):
        axis.legend(markerscale=2)


def _draw_percentiles(axis: Axes, latencies_ms: Sequence[float]) -> None:
    axis.set(xlabel="percentile of the answered")
    if not latencies_ms:
        return
    ordered = np.sort(latencies_ms)
    # Distance from the tail, so that each nine takes as much room as the one before.
    nines = -np.log10(1 - (np.arange(len(ordered)) + 0.5) / len(ordered))
    axis.plot(nines, ordered, color=_BLUE, drawstyle="steps-pre")
    ticks = [q for q in _TAIL if -np.log10(1 - q / 100) <= nines[-1]]
    axis.set_xticks([-np.log10(1 - q / 100) for q in ticks], [f"{q:g}" for q in ticks])
