"""The page and the picture of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.rollout_judge.study import ALPHA, summarise_fault, summarise_kept

_COLOURS = {
    "judge": "#1f5fa8",
    "z-test, once at its horizon": "#c0504d",
    "z-test, at every look": "#d99694",
    "Flagger, 99 % and 500 ms": "#6b8e23",
    "Flagger, 98 % and 75 ms": "#8a8a8a",
}
_MOST = 40_000  # outcomes that are shown


PAGE, PICTURE = "rollout-judge.md", "rollout-judge.png"

_INTRODUCTION = """\
# The rollout's judge on simulated traffic

    .venv/bin/python -m benchmarks.rollout_judge     # some minutes; page and picture into .bench/rollout_judge/

The judge of `app/rollout/judge.py`, the very code that runs, is shown counts of drawn traffic: 400 requests a second,
of which 1 % fail, latency lognormal around 20 ms (standard deviation of its logarithm 0.4), looked at every two
seconds. The guards are the default ones, but that an answer may take 5 ms longer instead of 20: 20 would forgive a
latency × 1.5 here. The same seed gives the same figures. Why this test: [decision 11](adr/0011-betting-judge.md).

- **z-test, once at its horizon**: two proportions at a number of outcomes that was fixed so that this very fault is
  found with 90 % power. It has to be told which fault to look for, and is blind before its horizon and after it.
- **z-test, at every look**: the same level, looked at as often as the judge looks.
- **Flagger**: success rate and p99 of each minute against fixed thresholds; back in the minute after the fifth failed
  check. With the thresholds of its documentation, and with ones that fit this traffic.

"""


def write_page(kept: Mapping[str, Any], faults: Mapping[str, Any]) -> str:
    """Markdown, with the picture beside it."""
    return f"{_INTRODUCTION}{write_tables(kept, faults)}\n![Caught, by the canary's outcomes]({PICTURE})\n"


def write_tables(kept: Mapping[str, Any], faults: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["## Canaries that keep every guard", ""]
    lines += [
        "Led through the whole default plan by `app/rollout/controller.py` itself, on a clock that is moved; promised:",
        f"at most {100 * ALPHA:g} % are rolled back.",
        "",
    ]
    lines += ["| canary | rule | runs | rolled back | 95 % interval |", "|---|---|---|---|---|"]
    for title, runs in kept.items():
        for name, row in summarise_kept(runs).items():
            interval = f"{100 * row['low']:.2f} to {100 * row['high']:.2f} %"
            lines.append(f"| {title} | {name} | {row['runs']} | {row['rolled_back']} | {interval} |")
    lines += ["", "## Canaries with a fault", ""]
    lines += ["At a share of 5 % from the start; the canary's outcomes until it is caught, windows for the shadow.", ""]
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
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    lines: dict[str, Line2D] = {}
    for axis, (title, runs) in zip(axes, faults.items(), strict=False):
        lines |= _draw_fault(axis, title, runs)
    for axis in axes[len(faults) :]:
        axis.set_axis_off()
    axes[-1].legend([lines[name] for name in _COLOURS], list(_COLOURS), loc="center", fontsize=13, frameon=False)
    figure.savefig(path, dpi=80)


def _draw_fault(axis: Axes, title: str, runs: Sequence[Mapping[str, int | None]]) -> dict[str, Line2D]:
    lines = {}
    for name in reversed(list(runs[0])):  # the judge's line above the others
        found = sorted(n for run in runs if (n := run[name]) is not None)
        part = [100 * (i + 1) / len(runs) for i in range(len(found))]
        x, y = [1, *found, _MOST], [0, *part, part[-1] if part else 0]
        [lines[name]] = axis.step(x, y, where="post", color=_COLOURS[name], linewidth=2.4 if name == "judge" else 1.6)
    axis.set(title=title, xscale="log", xlim=(20, _MOST), ylim=(-3, 103))
    axis.set(xlabel="the canary's outcomes", ylabel="caught, % of runs")
    axis.grid(alpha=0.25)
    return lines


def _number(n: float | None) -> str:
    return "-" if n is None else f"{n:,.0f}"
