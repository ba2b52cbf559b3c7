"""Tables and the picture of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rollout_judge.study import ALPHA, summarise_fault, summarise_kept

_COLOURS = {
    "judge": "#1f5fa8",
    "z-test, once at its horizon": "#c0504d",
    "z-test, at every look": "#d99694",
    "Flagger, 99 % and 500 ms": "#6b8e23",
    "Flagger, 98 % and 75 ms": "#8a8a8a",
}


def write_tables(kept: Mapping[str, Any], faults: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"Canaries that keep every guard, whole default plan; promised: at most {100 * ALPHA:g} %", ""]
    lines += ["| canary | rule | runs | rolled back | 95 % interval |", "|---|---|---|---|---|"]
    for title, runs in kept.items():
        for name, row in summarise_kept(runs).items():
            interval = f"{100 * row['low']:.2f} to {100 * row['high']:.2f} %"
            lines.append(f"| {title} | {name} | {row['runs']} | {row['rolled_back']} | {interval} |")
    lines += ["", "Canaries with a fault, at a share of 5 %; the canary's outcomes until it is caught", ""]
    lines += ["| fault | rule | caught | median | p90 |", "|---|---|---|---|---|"]
    for title, runs in faults.items():
        for name, found in summarise_fault(runs).items():
            lines.append(
                f"| {title} | {name} | {100 * (found['caught'] or 0):.0f} % "
                f"| {_number(found['median'])} | {_number(found['p90'])} |"
            )
    return "\n".join(lines) + "\n"


def draw(faults: Mapping[str, Sequence[Mapping[str, int | None]]], path: Path) -> None:
    """Of each fault, the part of runs in which each rule has caught it, by the canary's outcomes."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis in axes[len(faults) :]:
        axis.set_axis_off()
    for axis, (title, runs) in zip(axes, faults.items(), strict=False):
        _draw_fault(axis, title, runs)
    figure.savefig(path, dpi=80)


def _draw_fault(axis: Axes, title: str, runs: Sequence[Mapping[str, int | None]]) -> None:
    for name in runs[0]:
        found = sorted(n for run in runs if (n := run[name]) is not None)
        part = [100 * (i + 1) / len(runs) for i in range(len(found))]
        axis.step(
            [1, *found, 40_000], [0, *part, part[-1] if part else 0], where="post", label=name, color=_COLOURS[name]
        )
    axis.set(title=title, xscale="log", xlim=(30, 40_000), ylim=(-3, 103))
    axis.set(xlabel="the canary's outcomes", ylabel="caught, % of runs")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


def _number(n: float | None) -> str:
    return "-" if n is None else f"{n:,.0f}"
