"""Samples and splits: labels from the future, windows from the past, and a gap between what is learned and judged."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.bars import SYMBOLS, load_bars
from serve_app.features import HISTORY, latest_window
from serve_app.train.samples import DOWN, FLAT, UP, Samples, Split, make_samples, split_before, walk_forward

STARTS = ("2006-07-01", "2008-07-01", "2010-07-01")
GAPS = {"validation_days": 365, "embargo_days": 10}
EMBARGO = np.timedelta64(10, "D")


@pytest.fixture(scope="module", params=[1, 5])
def samples(request: pytest.FixtureRequest) -> Samples:
    return make_samples([load_bars(symbol) for symbol in SYMBOLS], horizon=request.param, threshold=0.4)


def test_a_window_is_what_serving_would_compute_on_that_day() -> None:
    bars = load_bars("FB")
    samples = make_samples([load_bars("IBM"), bars], horizon=1, threshold=0.4)
    rows = np.flatnonzero(samples.dates >= np.datetime64("2013-02-20"))[-3:]  # Facebook's, the last symbol
    for row, window in zip(rows, samples.windows(rows), strict=True):
        day = int(np.flatnonzero(bars.dates == samples.dates[row])[0])
        assert np.array_equal(window, latest_window(bars.ohlcv[: day + 1]))
        assert np.array_equal(window[:, -1], samples.last_bars(np.array([row]))[0])


def test_y_is_the_return_after_the_window_in_known_volatilities() -> None:
    bars = load_bars("IBM")
    samples = make_samples([bars], horizon=5, threshold=0.4)
    day = int(np.flatnonzero(bars.dates == samples.dates[1000])[0])
    close = np.log(bars.ohlcv[:, 3])
    s = np.sqrt(np.mean(np.diff(close)[day - HISTORY : day] ** 2))
    assert samples.y[1000] == pytest.approx((close[day + 5] - close[day]) / (s * np.sqrt(5)), rel=1e-9)
    assert samples.label_dates[1000] == bars.dates[day + 5]


def test_labels_follow_the_threshold(samples: Samples) -> None:
    assert (samples.labels[samples.y < -0.4] == DOWN).all()
    assert (samples.labels[np.abs(samples.y) < 0.4] == FLAT).all()
    assert (samples.labels[samples.y > 0.4] == UP).all()


def test_blocks_are_purged_and_never_overlap(samples: Samples) -> None:
    for split in walk_forward(samples, STARTS, **GAPS):
        assert_purged(samples, split)


def test_test_blocks_cover_everything_from_the_first_start_once(samples: Samples) -> None:
    tests = np.concatenate([split.test for split in walk_forward(samples, STARTS, **GAPS)])
    assert np.array_equal(np.sort(tests), np.flatnonzero(samples.dates >= np.datetime64(STARTS[0])))


def test_training_rows_only_ever_grow(samples: Samples) -> None:
    first, second, third = (set(split.train.tolist()) for split in walk_forward(samples, STARTS, **GAPS))
    assert first < second < third


def test_the_last_split_learns_from_no_return_of_the_held_out_bars(samples: Samples) -> None:
    start = np.datetime64("2012-12-04")
    split = split_before(samples, start, **GAPS)
    assert_purged(samples, split)
    assert (samples.label_dates[np.concatenate([split.train, split.validation])] < start).all()
    assert samples.label_dates[split.test].min() == start


def assert_purged(samples: Samples, split: Split) -> None:
    for earlier, later in ((split.train, split.validation), (split.validation, split.test)):
        assert len(earlier) > 0
        assert samples.label_dates[earlier].max() + EMBARGO < samples.label_dates[later].min()
        assert samples.label_dates[earlier].max() < samples.dates[later].min() or split.test is later
    assert not set(split.train) & set(split.validation)
    assert not (set(split.train) | set(split.validation)) & set(split.test)
