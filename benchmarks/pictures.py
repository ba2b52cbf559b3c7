"""Plots of a run: throughput by system, and what the gateway's cost does as connections rise."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.figures import Key, Results, keys, over_rounds, p99_ms, rps
from benchmarks.rounds import NOOP, SHIPPED, SMALL

_OURS, _THEIRS = "#1f5fa8", "#9aa5b1"
_ROLES = ("gateway", "bridge", "replica", "ray system")
_CONNECTIONS = 32


def draw_all(results: Results) -> dict[str, bytes]:
    """PNG files by name; what was not measured is not drawn."""
    pictures = {}
    if bars := [key for key in keys(results) if key.connections == _CONNECTIONS and key.loop == "closed"]:
        pictures["throughput.png"] = _png(_throughput(results, bars))
    if any("cpu_ms" in row for row in results.get("sweep", ())):
        pictures["cost-by-connections.png"] = _png(_cost(results))
    return pictures


def _throughput(results: Results, found: Sequence[Key]) -> Figure:
    models = [model for model in (NOOP, SMALL, SHIPPED) if any(key.model == model for key in found)]
    figure = Figure(figsize=(5.2 * len(models), 4.4), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        _draw_bars(axis, results, [key for key in found if key.model == model])
        axis.set(title=model, xlabel="requests/s")
    figure.suptitle(f"{_CONNECTIONS} connections: requests per second, and p99 of the closed loop")
    return figure


def _draw_bars(axis: Axes, results: Results, found: Sequence[Key]) -> None:
    spreads = {key: over_rounds(results, key, rps) for key in found}
    ordered = sorted(((s, key) for key, s in spreads.items() if s), key=lambda pair: pair[0].median)
    for place, (s, key) in enumerate(ordered):
        colour = _OURS if key.system == "sluice" else _THEIRS
        axis.barh(place, s.median, color=colour, xerr=[[s.median - s.low], [s.high - s.median]], ecolor="black")
        tail = over_rounds(results, key, p99_ms)
        label = f"  {s.median:,.0f}" + (f", p99 {tail.median:.0f} ms" if tail else "")
        axis.annotate(label, (s.high, place), va="center", fontsize=8)
    titles = results["titles"]
    names = [f"{titles.get(key.system, key.system)}, {key.lane}" + _times(key.windows) for _, key in ordered]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlim(0, 1.5 * max((s.high for s, _ in ordered), default=1.0))  # room for the figures
    axis.locator_params(axis="x", nbins=5)


def _times(windows: int) -> str:
    return f" ×{windows}" if windows > 1 else ""


def _cost(results: Results) -> Figure:
    rows = [row for row in results["sweep"] if "cpu_ms" in row]
    connections = [row["connections"] for row in rows]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axis = figure.subplots()
    for role in _ROLES:
        width, marker = (2.5, "o") if role == "gateway" else (1.2, ".")
        axis.plot(connections, [row["cpu_ms"].get(role, 0.0) for row in rows], label=role, lw=width, marker=marker)
    axis.set(xscale="log", xlabel="connections", ylabel="CPU-ms per request", title="Sluice, noop, binary body")
    axis.set_xticks(connections, [str(count) for count in connections])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend()
    return figure


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as buffer, mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()
