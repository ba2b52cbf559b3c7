"""One load test from start to end, with its progress in the terminal."""

from __future__ import annotations

import asyncio

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.bench.inputs import time_windows
from app.bench.load import OK, Plan, Sample, Target, apply_load, warm_up
from app.bench.report import Report, describe_ms, summarise

_PERIOD_S = 0.25
_RECENT = 500  # requests that the live percentiles are of
_WINDOWS_TIMED = 200


def run(
    target: Target, plan: Plan, *, body: str, windows_per_request: int, seed: int, console: Console
) -> tuple[Report, list[Sample]]:
    """Time the features, open and warm up the target, apply the load.

    Args:
        target: What is asked; it is closed in the end.
        plan: How much and when.
        body: Name of the form the windows travel in.
        windows_per_request: In each.
        seed: Of the bars whose windows are timed.
        console: Where progress is shown, if that is a terminal.

    Raises:
        NoTarget: There is nothing to measure.
    """
    window_times_s = time_windows(_WINDOWS_TIMED, seed)
    samples: list[Sample] = []
    total_time_s = uvloop.run(_measure(target, plan, samples, console))
    report = summarise(
        samples,
        plan,
        total_time_s,
        target=target.name,
        body=body,
        windows_per_request=windows_per_request,
        window_times_s=window_times_s,
    )
    return report, samples


async def _measure(target: Target, plan: Plan, samples: list[Sample], console: Console) -> float:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bars:
        bar = bars.add_task("opening", total=plan.expected, figures="")
        watch = asyncio.create_task(_show(bars, bar, samples))
        try:
            await target.open()
            await warm_up(target, plan)
            bars.update(bar, description="asking")
            return await apply_load(target, plan, samples)
        finally:
            watch.cancel()
            await target.close()


async def _show(bars: Progress, bar: TaskID, samples: list[Sample]) -> None:
    while True:
        recent = samples[-_RECENT:]
        figures = describe_ms([sample.latency_s for sample in recent if sample.outcome.code == OK])
        failed = sum(sample.outcome.code != OK for sample in recent)
        text = f"{len(samples)} answered"
        if figures["p50"] is not None and figures["p99"] is not None:
            text += f", lately p50 {figures['p50']:.1f} ms, p99 {figures['p99']:.1f} ms, {failed} failed"
        bars.update(bar, completed=len(samples), figures=text, refresh=True)
        await asyncio.sleep(_PERIOD_S)
