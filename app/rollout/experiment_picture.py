"""An experiment's report as a picture: each figure with its interval, and how calibrated the arms are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# By side. Of one side's arms the first is drawn in full, those that answered for it dashed.
_COLOURS = {"stable": "#1f5fa8", "canary": "#c26a1b"}
_PANELS = (
    ("hit_rate", "hit rate"),
    ("log_loss", "log loss, nats"),
    ("brier", "Brier score"),
    ("calibration_error", "calibration error"),
    ("coverage_90", "share in the 90 % interval"),
    ("rmse", "RMSE, volatilities"),
)
_NOMINAL = {"coverage_90": 0.9}

_Arm = dict[str, Any]


def report_picture(document: dict[str, Any], file_format: str) -> bytes:
    """PNG or SVG of a report: figures with 95 % intervals, the difference of the hit rates, and reliability.

    Args:
        document: As `app.rollout.experiment_report.Report.document` gives it.
        file_format: `png` or `svg`.
    """
    arms = [arm for arm in document["arms"] if arm["measures"]["labelled"]]
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
    figures, reliability = halves
    axes: list[Axes] = list(figures.subplots(3, 2).ravel())
    for axis, (name, title) in zip(axes, _PANELS, strict=True):
        _draw_figure(axis, arms, name, title)
    _draw_reliability(reliability.subplots(), arms)
    figure.suptitle(_title(document))
    with io.BytesIO() as buffer, mpl.rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "sluice"}):
        figure.savefig(buffer, format=file_format, dpi=110)
        return buffer.getvalue()


def _draw_figure(axis: Axes, arms: Sequence[_Arm], name: str, title: str) -> None:
    for row, arm in enumerate(arms):
        if (estimate := arm["measures"][name]) is None:
            continue
        if estimate["low"] is not None:
            axis.hlines(row, estimate["low"], estimate["high"], color=_COLOURS[arm["side"]], lw=2)
        axis.plot(estimate["value"], row, "o", color=_COLOURS[arm["side"]], ms=6)
    if name in _NOMINAL:
        axis.axvline(_NOMINAL[name], color="black", lw=1, ls=":")
    axis.set_yticks(range(len(arms)), [f"{arm['side']}\n{arm['arm']}" for arm in arms], fontsize=8)
    axis.set_ylim(max(len(arms), 1) - 0.5, -0.5)
    axis.set_title(title, fontsize=10)
    _tidy(axis)


def _draw_reliability(axis: Axes, arms: Sequence[_Arm]) -> None:
    axis.plot([0, 1], [0, 1], ":", color="black", lw=1)
    most = max((of["n"] for arm in arms for of in arm["measures"]["reliability"]), default=1)
    drawn: set[str] = set()
    for arm in sorted(arms, key=lambda arm: -arm["measures"]["labelled"]):
        bins = arm["measures"]["reliability"]
        x, y = [of["confidence"] for of in bins], [of["hit_rate"] for of in bins]
        colour = _COLOURS[arm["side"]]
        style = "--" if arm["side"] in drawn else "-"
        drawn.add(arm["side"])
        axis.plot(x, y, style, color=colour, lw=1, alpha=0.7, label=f"{arm['side']}: {arm['arm']}")
        axis.scatter(x, y, s=[4 + 96 * of["n"] / most for of in bins], color=colour, alpha=0.7, linewidths=0)
    axis.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="probability of the likeliest class",
        ylabel="share of windows in which it happened",
    )
    axis.set_title("reliability; larger dots, more windows", fontsize=10)
    axis.set_aspect("equal")
    if arms:
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _title(document: dict[str, Any]) -> str:
    by_window, by_caller = document["hit_rate_difference"], document["hit_rate_difference_by_caller"]
    if by_window is None:
        return "The sides' hit rates cannot be compared yet"
    text = f"canary's hit rate less stable's: {_points(by_window)} points with windows as draws"
    if by_caller["low"] is not None:
        text += f", {_points(by_caller)} with callers as draws"
    return text


def _points(estimate: dict[str, Any]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
