"""The features: the same alone and in a batch, blind to the future and to units, and as TA-Lib has them."""

from __future__ import annotations

import numpy as np
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.bars import SYMBOLS, load_bars
from serve_app.contract import N_FEATURES, N_STEPS
from serve_app.features import FEATURE_NAMES, HISTORY, WINDOW_BARS, Array, features, fingerprint, latest_window

COLUMN = {name: i for i, name in enumerate(FEATURE_NAMES)}


@pytest.fixture(scope="module")
def ibm() -> Array:
    return load_bars("IBM").ohlcv


def test_there_are_fifty_distinct_names() -> None:
    assert len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == N_FEATURES


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_bar_alone_has_the_same_bits_as_in_the_batch(symbol: str) -> None:
    bars = load_bars(symbol).ohlcv
    batch = features(bars)
    assert np.isfinite(batch).all()
    for i in range(0, len(batch), 7):
        assert np.array_equal(features(bars[i : i + HISTORY + 1])[0], batch[i]), i


def test_the_latest_window_is_the_end_of_the_batch(ibm: Array) -> None:
    window = latest_window(ibm)
    assert window.shape == (N_FEATURES, N_STEPS)
    assert window.flags.c_contiguous
    assert np.array_equal(window, features(ibm)[-N_STEPS:].T.astype(np.float32))
    assert np.array_equal(window, latest_window(ibm[-WINDOW_BARS:]))


def test_the_future_changes_no_bit_of_the_past(ibm: Array) -> None:
    changed = ibm.copy()
    changed[2000:] *= 1.3
    before, after = features(ibm), features(changed)
    first_changed = 2000 - HISTORY
    assert np.array_equal(before[:first_changed], after[:first_changed])
    assert not np.array_equal(before[first_changed], after[first_changed])


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_units_of_price_and_volume_change_nothing(symbol: str) -> None:
    bars = load_bars(symbol).ohlcv
    np.testing.assert_allclose(features(bars * [3, 3, 3, 3, 7]), features(bars), rtol=0, atol=1e-9)


def test_only_the_last_sixty_bars_matter(ibm: Array) -> None:
    changed = ibm.copy()
    changed[: 1000 - HISTORY] *= 2
    assert np.array_equal(features(changed[:1001])[-1], features(ibm[:1001])[-1])


@given(
    seed=st.integers(0, 2**32 - 1),
    daily_sd=st.sampled_from([0.0, 1e-9, 1e-4, 0.02, 0.5]),
    untraded=st.booleans(),
    flat_bars=st.integers(0, 120),
)
@settings(max_examples=60, deadline=None)
def test_any_valid_bars_give_finite_features(seed: int, daily_sd: float, untraded: bool, flat_bars: int) -> None:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, daily_sd, 130)))
    open_ = close * np.exp(rng.normal(0, daily_sd, 130))
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(0, daily_sd, 130)))
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(0, daily_sd, 130)))
    volume = np.zeros(130) if untraded else rng.integers(0, 1000, 130).astype(float)
    bars = np.column_stack([open_, high, low, close, volume])
    bars[130 - flat_bars :, :4] = bars[129, 3]
    assert np.isfinite(features(bars)).all()


def talib_values(bars: Array) -> dict[str, Array]:
    """The features that TA-Lib can compute, from logarithms of prices, in its own conventions."""
    open_, high, low, close = np.log(bars[:, :4].T)
    r = np.diff(close, prepend=close[0])
    s = np.sqrt(talib.SMA(r * r, 60))
    atr20 = talib.SMA(talib.TRANGE(high, low, close)[1:], 20)
    k14, d3 = talib.STOCHF(high, low, close, fastk_period=14, fastd_period=3, fastd_matype=0)
    upper, middle, _ = talib.BBANDS(close, timeperiod=20, nbdevup=2, nbdevdn=2, matype=0)
    up14, down14 = talib.SUM(np.maximum(r, 0), 14), talib.SUM(np.maximum(-r, 0), 14)
    return {
        **{f"zret_{k}": talib.MOM(close, timeperiod=k) / (s * np.sqrt(k)) for k in (1, 10, 60)},
        "bop": talib.BOP(open_, high, low, close),
        "lnvol60": np.log(s),
        "atr20": np.concatenate([[np.nan], np.log(atr20)]) - np.log(s),
        "rsi14": (up14 - down14) / (up14 + down14),
        "stochk14": k14 / 50 - 1,
        "stochd3": d3 / 50 - 1,
        "cci20": talib.CCI(high, low, close, timeperiod=20) / 100,
        "pctb20": (close - middle) / (upper - middle),
        "sma5_20": (talib.SMA(close, 5) - talib.SMA(close, 20)) / (s * np.sqrt(20)),
        "trendcorr20": talib.CORREL(close, np.arange(len(close), dtype=float), timeperiod=20),
        "aroon25": talib.AROONOSC(high, low, timeperiod=25) / 100,
        "donch60": 2 * (close - talib.MIN(low, 60)) / (talib.MAX(high, 60) - talib.MIN(low, 60)) - 1,
    }


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_talib_agrees_where_the_definitions_coincide(symbol: str) -> None:
    bars = load_bars(symbol).ohlcv
    ours = features(bars)
    for name, theirs in talib_values(bars).items():
        # TA-Lib keeps running sums, whose rounding grows along the series.
        np.testing.assert_allclose(ours[:, COLUMN[name]], theirs[HISTORY:], rtol=0, atol=2e-6, err_msg=name)


def test_formulas_without_an_oracle_match_a_plain_reading(ibm: Array) -> None:
    bars = ibm[500 : 500 + HISTORY + 1]
    got = dict(zip(FEATURE_NAMES, features(bars)[0], strict=True))
    lo, lh, ll, lc = np.log(bars[:, :4].T)
    volume = bars[:, 4]
    r = np.diff(lc)
    s = np.sqrt(np.mean(r**2))
    clv = (2 * lc - lh - ll) / (lh - ll)
    v = volume[1:] / volume[1:].mean()
    plus = [max(lh[i] - lh[i - 1], 0) if lh[i] - lh[i - 1] > ll[i - 1] - ll[i] else 0 for i in range(47, 61)]
    minus = [max(ll[i - 1] - ll[i], 0) if ll[i - 1] - ll[i] > lh[i] - lh[i - 1] else 0 for i in range(47, 61)]
    tr = [max(lh[i], lc[i - 1]) - min(ll[i], lc[i - 1]) for i in range(41, 61)]
    tp = (lh + ll + lc) / 3
    a = np.abs(r) / (v + 0.01)
    d = r[-20:] - r[-20:].mean()
    five = np.array([lc[i] - lc[i - 5] for i in range(6, 61)])
    expected = {
        "gap": (lo[60] - lc[59]) / s,
        "upshadow": (lh[60] - max(lo[60], lc[60])) / s,
        "dnshadow": (min(lo[60], lc[60]) - ll[60]) / s,
        "clv5": clv[-5:].mean(),
        "lvr_10": np.log(np.sqrt(np.mean(r[-10:] ** 2)) / s),
        "pk20": np.log(np.sqrt(np.mean((lh - ll)[-20:] ** 2) / (4 * np.log(2))) / s),
        "gk20": np.log(np.sqrt(np.mean((0.5 * (lh - ll) ** 2 - (2 * np.log(2) - 1) * (lc - lo) ** 2)[-20:])) / s),
        "rs20": np.log(np.sqrt(np.mean(((lh - lc) * (lh - lo) + (ll - lc) * (ll - lo))[-20:])) / s),
        "trshock": np.log(tr[-1] / np.mean(tr)),
        "downshare20": np.sum(np.minimum(r[-20:], 0) ** 2) / np.sum(r[-20:] ** 2) - 0.5,
        "skew60": np.mean((r - r.mean()) ** 3) / r.std() ** 3,
        "lkurt60": np.log(np.mean((r - r.mean()) ** 4) / r.std() ** 4),
        "ac1_20": np.sum(d[1:] * d[:-1]) / np.sum(d**2),
        "lvr5_60": np.log(np.mean(five**2) / (5 * s**2)),
        "rsi5": np.sum(r[-5:]) / np.sum(np.abs(r[-5:])),
        "er10": np.sum(r[-10:]) / np.sum(np.abs(r[-10:])),
        "didiff14": (np.sum(plus) - np.sum(minus)) / np.sum(tr[-14:]),
        "relvol": np.log(v[-1] + 0.01),
        "vol5_20": np.log((v[-5:].mean() + 0.01) / (v[-20:].mean() + 0.01)),
        "cmf20": np.sum((clv * volume)[-20:]) / np.sum(volume[-20:]),
        "mfi14": np.sum(np.sign(np.diff(tp))[-14:] * volume[-14:]) / np.sum(volume[-14:]),
        "obv20": np.sum(np.sign(r[-20:]) * volume[-20:]) / np.sum(volume[-20:]),
        "volcorr20": np.corrcoef(np.abs(r[-20:]), np.log(v[-20:] + 0.01))[0, 1],
        "vwap20": (lc[60] - np.average(tp[-20:], weights=volume[-20:])) / (s * np.sqrt(20)),
        "amihud5_60": np.log((a[-5:].mean() + 0.001 * s) / (a.mean() + 0.001 * s)),
        "sma20_60": (lc[-20:].mean() - lc[-60:].mean()) / (s * np.sqrt(60)),
        "body": (lc[60] - lo[60]) / s,
        "clv": clv[60],
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name


def test_the_fingerprint_changes_with_order_and_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = {fingerprint()}
    monkeypatch.setattr("serve_app.features.FEATURE_NAMES", FEATURE_NAMES[::-1])
    prints.add(fingerprint())
    monkeypatch.setattr("serve_app.features.DEFINITION_VERSION", 2)
    prints.add(fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda bars: bars[:60], "60 bars before"),
        (lambda bars: bars[:, :4], "five columns"),
        (lambda bars: np.where(np.arange(5) == 4, -1.0, bars), "volume"),
        (lambda bars: np.where(np.arange(5) == 4, 1e307, bars), "volume"),
        (lambda bars: bars * [1, 1, 1, 0, 1], "above zero"),
        (lambda bars: bars * [1, 0.5, 1, 1, 1], "below its low"),
        (lambda bars: np.where(np.arange(5) == 3, np.nan, bars), "finite"),
    ],
)
def test_bars_that_are_none_are_refused(ibm: Array, change, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        features(change(ibm[:61]))


def test_a_window_of_too_few_bars_is_refused(ibm: Array) -> None:
    with pytest.raises(ValueError, match="120 bars, got 119"):
        latest_window(ibm[:119])
