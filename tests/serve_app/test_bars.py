"""The shipped bars: complete, sane and adjusted."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from serve_app.bars import DATA_FILE, SYMBOLS, data_hash, load_bars


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_bars_are_ordered_finite_and_inside_their_range(symbol: str) -> None:
    bars = load_bars(symbol)
    open_, high, low, close, volume = bars.ohlcv.T
    assert (np.diff(bars.dates) > np.timedelta64(0, "D")).all()
    assert np.isfinite(bars.ohlcv).all()
    assert (low > 0).all()
    assert (volume > 0).all()
    assert (high >= np.maximum(open_, close) * (1 - 1e-12)).all()
    assert (low <= np.minimum(open_, close) * (1 + 1e-12)).all()


def test_all_of_the_source_is_there() -> None:
    assert {symbol: len(load_bars(symbol)) for symbol in SYMBOLS} == {
        "AAPL": 3270,
        "FB": 196,
        "GOOG": 2148,
        "IBM": 3270,
        "MSFT": 3270,
    }
    assert all(load_bars(symbol).dates[-1] == np.datetime64("2013-03-01") for symbol in SYMBOLS)


def test_a_split_is_no_return() -> None:
    """Microsoft split two for one on 18 February 2003: unadjusted, its price halves."""
    bars = load_bars("MSFT")
    day = int(np.flatnonzero(bars.dates == np.datetime64("2003-02-18"))[0])
    returns = np.diff(np.log(bars.ohlcv[:, 3]))
    assert abs(returns[day - 1]) < 0.05
    assert np.abs(returns).max() < 0.2


def test_the_notice_names_the_hash_of_the_file() -> None:
    assert data_hash() == hashlib.sha256(DATA_FILE.read_bytes()).hexdigest()
    assert data_hash() in (DATA_FILE.parent / "NOTICE.md").read_text(encoding="utf-8")


def test_bars_cannot_be_changed_by_a_reader() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_bars("IBM").ohlcv[0, 0] = 1.0


def test_an_unknown_symbol_is_named_in_the_refusal() -> None:
    with pytest.raises(ValueError, match="'TSLA'"):
        load_bars("TSLA")
