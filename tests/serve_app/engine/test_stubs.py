"""Engines without a model."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.contract import Options
from serve_app.engine import load_engine, stubs


@pytest.mark.parametrize("size", [1, 7])
def test_sleep_takes_ten_milliseconds_a_window_and_answers_what_noop_does(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(stubs.time, "sleep", slept.append)
    windows = np.zeros((size, 50, 60), np.float32)
    answer = load_engine(None, engine="sleep").predict(windows, Options())
    assert slept == [pytest.approx(0.01 * size)]
    assert answer.model_time_ms == pytest.approx(10 * size)
    answer.check()
    expected = load_engine(None, engine="noop").predict(windows, Options())
    np.testing.assert_array_equal(answer.classification_probs, expected.classification_probs)
