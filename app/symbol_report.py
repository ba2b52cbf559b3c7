"""What `sluice predict --symbol` shows: one window of the shipped bars, the gateway's answer, in readable units."""

from __future__ import annotations

import math
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.client import GatewayClient
from serve_app.bars import Bars, load_bars
from serve_app.contract import CLASSES, N_STEPS, FloatArray
from serve_app.features import FEATURE_NAMES, HISTORY, latest_window
from serve_app.registry import Registry, RegistryError

_Z90 = 1.6448536269514722  # two-sided 90 % of a normal distribution
_LOG_VOLATILITY = "lnvol60"


class NoWindow(Exception):
    """There are too few bars before the day asked for."""


def ask(gateway: GatewayClient, symbol: str, until: date | None, registry_path: Path) -> dict[str, Any]:
    """Compute the newest window that ends by `until`, ask the gateway, and put both into one JSON-ready report.

    Raises:
        NoWindow: Fewer than 120 bars end by `until`.
        GatewayRefused: The gateway did not predict.
    """
    window, last_day = window_until(load_bars(symbol), until)
    started = time.perf_counter()
    answer = gateway.predict(window)
    round_trip_ms = 1000 * (time.perf_counter() - started)
    mean = answer["predictions"]["regression_pred"][0]
    deviation = _uncertainty(answer, "regression_uncertainty")
    # The model speaks in units of the last 60 days' volatility; people think in per cent.
    volatility = math.exp(window[FEATURE_NAMES.index(_LOG_VOLATILITY), -1])
    return {
        "symbol": symbol,
        "window_end": last_day.isoformat(),
        "sample": sample_of(registry_path, answer["model_name"], answer["model_version"], symbol, last_day),
        "probabilities": dict(zip(CLASSES, answer["predictions"]["classification_probs"][0], strict=True)),
        "expected_return_pct": 100 * volatility * mean,
        "interval_90_pct": None
        if deviation is None
        else [100 * volatility * (mean + sign * _Z90 * deviation) for sign in (-1, 1)],
        "expected_return_sd": mean,
        "uncertainty_sd": {name: _uncertainty(answer, name) for name in ("aleatoric", "epistemic")},
        "model": f"{answer['model_name'] or 'unknown'} {answer['model_version'] or ''}".rstrip(),
        "served_by": answer["backend"],
        "model_time_ms": answer["model_time_ms"],
        "processing_time_ms": answer["processing_time_ms"],
        "round_trip_ms": round_trip_ms,
        "request_id": answer["request_id"],
    }


def window_until(bars: Bars, until: date | None) -> tuple[FloatArray, date]:
    """The newest window float32[F, T] whose last bar is not after `until`, and that bar's day. Raises `NoWindow`."""
    count = len(bars.dates) if until is None else int(np.searchsorted(bars.dates, np.datetime64(until), side="right"))
    if count < N_STEPS + HISTORY:
        raise NoWindow(f"{bars.symbol} has {count} bars by then; a window needs {N_STEPS + HISTORY}")
    return latest_window(bars.ohlcv[:count]), bars.dates[count - 1].astype(date)


def sample_of(registry_path: Path, model: str | None, version: str | None, symbol: str, last_day: date) -> str:
    """Whether training saw the day after the window: `in`, `out` or `unknown` (the version is not in this registry)."""
    if model is None or version is None:
        return "unknown"
    try:
        training = Registry(registry_path).verify(model, version).training
    except RegistryError:
        return "unknown"
    held_out_from = training.held_out_from.get(symbol) if training else None
    if held_out_from is None:
        return "unknown"
    return "out" if last_day >= held_out_from else "in"


def _uncertainty(answer: dict[str, Any], name: str) -> float | None:
    """The only window's value; None where a remote legacy service did not tell it."""
    values = (answer["uncertainty"] or {}).get(name)
    return None if values is None else values[0]


def render(report: dict[str, Any]) -> Group:
    """The report for people."""
    table = Table("down", "flat", "up", "expected return", "90 % interval", "sample")
    interval = report["interval_90_pct"]
    table.add_row(
        *(f"{probability:.1%}" for probability in report["probabilities"].values()),
        f"{report['expected_return_pct']:+.2f} %",
        "unknown" if interval is None else f"{interval[0]:+.2f} % to {interval[1]:+.2f} %",
        {"in": "in sample", "out": "out of sample", "unknown": "unknown"}[report["sample"]],
    )
    head = Text(f"{report['symbol']}, the trading day after {report['window_end']}", style="bold")
    uncertainty = report["uncertainty_sd"]
    foot = Text(
        f"model {report['model']}, served by {report['served_by']}: {report['model_time_ms']:.1f} ms in the model, "
        f"{report['processing_time_ms']:.1f} ms at the gateway, {report['round_trip_ms']:.1f} ms here\n"
        f"uncertainty in volatilities: aleatoric {_figure(uncertainty['aleatoric'], '.2f')}, "
        f"epistemic {_figure(uncertainty['epistemic'], '.3f')}; request {report['request_id']}"
    )
    return Group(head, table, foot)


def _figure(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
