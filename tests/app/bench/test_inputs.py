"""The windows that are asked with are real ones, and the same for one seed."""

from __future__ import annotations

import numpy as np

from app.bench.inputs import draw_bars, draw_windows, time_windows
from serve_app.bars import SYMBOLS, load_bars
from serve_app.contract import as_windows
from serve_app.features import latest_window


def test_windows_are_those_of_shipped_bars() -> None:
    windows = draw_windows(3, 2, seed=4)
    assert [window.shape for window in windows] == [(2, 50, 60)] * 3
    for window in windows:
        assert as_windows(window) is window, "needs no copy"
    np.testing.assert_array_equal(windows[0][1], latest_window(draw_bars(6, seed=4)[1]))
    known = {bars.tobytes() for symbol in SYMBOLS for bars in np.array_split(load_bars(symbol).ohlcv, 1)}
    assert all(any(bars.tobytes() in history for history in known) for bars in draw_bars(6, seed=4))


def test_a_seed_is_a_choice() -> None:
    one, same, other = (draw_windows(4, 1, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_each_window_is_timed_by_itself() -> None:
    ticks = iter(np.cumsum([0, 1, 10, 2, 10, 4]).astype(float))
    assert list(time_windows(3, seed=0, clock=lambda: float(next(ticks)))) == [1.0, 2.0, 4.0]
