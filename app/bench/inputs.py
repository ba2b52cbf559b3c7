"""Real windows to ask with, drawn from the shipped bars, and the time that computing one takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from serve_app.bars import SYMBOLS, load_bars
from serve_app.contract import FloatArray
from serve_app.features import WINDOW_BARS, latest_window


def draw_windows(count: int, n_windows: int, seed: int) -> list[FloatArray]:
    """Inputs for `count` requests.

    Args:
        count: How many.
        n_windows: B, windows of each.
        seed: Of which symbols and days.

    Returns:
        C-contiguous float32[B,F,T] each.
    """
    windows = [latest_window(bars) for bars in draw_bars(count * n_windows, seed)]
    return [np.stack(windows[start : start + n_windows]) for start in range(0, len(windows), n_windows)]


def draw_bars(count: int, seed: int) -> list[npt.NDArray[np.float64]]:
    """Stretches float64[120,5] of bars, each just long enough for one window."""
    rng = np.random.default_rng(seed)
    histories = [load_bars(symbol).ohlcv for symbol in SYMBOLS]
    stretches = []
    for symbol in rng.integers(len(histories), size=count):
        start = rng.integers(len(histories[symbol]) - WINDOW_BARS + 1)
        stretches.append(histories[symbol][start : start + WINDOW_BARS])
    return stretches


def time_windows(count: int, seed: int, clock: Callable[[], float] = time.perf_counter) -> npt.NDArray[np.float64]:
    """Seconds float64[count] that computing one window from its bars took, one after another."""
    stretches = draw_bars(count, seed)
    latest_window(stretches[0])
    times = []
    for bars in stretches:
        began = clock()
        latest_window(bars)
        times.append(clock() - began)
    return np.array(times)
