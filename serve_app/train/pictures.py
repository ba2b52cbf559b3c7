"""Pictures for the model card, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from serve_app.contract import CLASSES
from serve_app.train.baselines import Forecast
from serve_app.train.metrics import Outcomes, coverage, volatility_table
from serve_app.train.samples import Floats

COLOURS = ("#1f5fa8", "#c26a1b", "#8a8a8a")


def reliability_picture(forecasts: Mapping[str, Forecast], outcomes: Outcomes) -> bytes:
    """PNG: for each class, how often it happened against how likely it was called, in ten bins of equal count."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, len(CLASSES))
    for c, axis in enumerate(axes):
        for colour, (name, forecast) in zip(COLOURS, forecasts.items(), strict=False):
            assert forecast.probs is not None
            called, happened, error = _reliability(forecast.probs[:, c], outcomes.labels == c)
            axis.errorbar(called, happened, error, fmt="o-", ms=4, lw=1, capsize=2, color=colour, label=name)
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], ":", color="black", lw=1)
        axis.set(title=CLASSES[c], xlabel="probability called")
    axes[0].set_ylabel("share that happened (± 1.96 s.e.)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(forecasts), frameon=False)
    return _png(figure)


def coverage_picture(forecasts: Mapping[str, Forecast], y: Floats) -> bytes:
    """PNG: actual against nominal coverage of central intervals, and predicted against actual volatility."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = np.linspace(0.05, 0.99, 48)
    for colour, (name, forecast) in zip(COLOURS, forecasts.items(), strict=False):
        excess = [coverage(forecast, y, level) - level for level in levels]
        left.plot(100 * levels, 100 * np.array(excess), color=colour, label=name)
        predicted, actual = np.array(volatility_table(forecast, y)).T
        right.plot(predicted, actual, "o-", ms=5, lw=1, color=colour, label=name)
    left.axhline(0, color="black", lw=1, ls=":")
    left.set(xlabel="nominal coverage of the interval, %", ylabel="actual less nominal, points")
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], ":", color="black", lw=1)
    right.set(xlabel="predicted deviation, by fifths", ylabel="actual root mean square error")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(forecasts), frameon=False)
    return _png(figure)


def _reliability(called: Floats, happened: np.ndarray) -> tuple[Floats, Floats, Floats]:
    bins = np.array_split(np.argsort(called, kind="stable"), 10)
    x = np.array([called[rows].mean() for rows in bins])
    share = np.array([happened[rows].mean() for rows in bins])
    error = np.array([1.96 * np.sqrt(p * (1 - p) / len(rows)) for p, rows in zip(share, bins, strict=True)])
    return x, share, error


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with mpl.rc_context({"savefig.dpi": 110}):
        figure.savefig(buffer, format="png", metadata={"Software": None})  # same figures, same bytes
    return buffer.getvalue()
