"""Fifty features of daily bars: one pure function for training and for serving.

Every feature of a bar depends on that bar and the 60 before it, on nothing later, and on no unit of price or volume.
A row computed alone has the same bits as in a batch: each window is copied before it is summed, so that the order of
additions depends on the window's length only. For the same reason there are no running sums and no recursive averages
(Wilder's, exponential), whose values depend on where a history begins.

Notation: lo, lh, ll, lc are the logarithms of open, high, low, close and tp = (lh + ll + lc)/3; r is the change of lc
over one bar; s is the root mean square of r over 60 bars, the common unit of scale; V is volume and v = V / mean_60 V;
TR is the true range and CLV = (2 lc - lh - ll)/(lh - ll) the close's place in the bar's range, both of logarithms;
mean_k and sum_k go over the last k bars. Denominators are kept from zero: a flat or untraded stretch is finite.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from serve_app.contract import N_STEPS, FloatArray

Array = npt.NDArray[np.float64]

HISTORY = 60
"""Bars needed before the first bar that gets features."""

WINDOW_BARS = HISTORY + N_STEPS
"""Bars behind one window of the model."""

DEFINITION_VERSION = 1
"""Raise it when a formula changes: models know by `fingerprint` which definition they were trained on."""

MOMENTUM_BARS = (1, 2, 3, 5, 10, 20, 40, 60)

FEATURE_NAMES: tuple[str, ...] = (
    *(f"zret_{k}" for k in MOMENTUM_BARS),  # (lc - lc[-k]) / (s √k); Moskowitz, Ooi and Pedersen 2012
    "gap",  # (lo - lc[-1]) / s
    "body",  # (lc - lo) / s
    "upshadow",  # (lh - max(lo, lc)) / s
    "dnshadow",  # (min(lo, lc) - ll) / s
    "clv",  # CLV
    "bop",  # (lc - lo) / (lh - ll), balance of power
    "clv5",  # mean_5 CLV
    "lvr_5",  # ln(rms_5 r / s), short against long volatility
    "lvr_10",
    "lvr_20",
    "pk20",  # ln of Parkinson's volatility over s; Parkinson 1980
    "gk20",  # ln of Garman and Klass's over s; Garman and Klass 1980
    "rs20",  # ln of Rogers and Satchell's over s; Rogers and Satchell 1991
    "trshock",  # ln(TR / mean_20 TR)
    "atr20",  # ln(mean_20 TR / s)
    "lnvol60",  # ln s, the only feature with a level
    "downshare20",  # sum_20 min(r, 0)² / sum_20 r² - 1/2, downside semivariance
    "skew60",  # third standardised moment of r
    "lkurt60",  # ln of the fourth
    "ac1_20",  # autocorrelation of r at lag 1
    "lvr5_60",  # ln(mean square of 5-bar returns / 5 s²), variance ratio; Lo and MacKinlay 1988
    "rsi14",  # (U - D) / (U + D) with U, D = sum_14 of moves up and down: Cutler's RSI on [-1, 1]
    "rsi5",
    "stochk14",  # 2 (lc - lowest_14) / (highest_14 - lowest_14) - 1, stochastic %K
    "stochd3",  # mean_3 of it, %D
    "donch60",  # the same place in the channel of 60 bars
    "cci20",  # (tp - mean_20 tp) / (1.5 mean absolute deviation), Lambert's CCI / 100
    "pctb20",  # (lc - mean_20 lc) / (2 sd_20 lc), Bollinger's %b
    "sma5_20",  # (mean_5 lc - mean_20 lc) / (s √20)
    "sma20_60",  # (mean_20 lc - mean_60 lc) / (s √60)
    "trendcorr20",  # correlation of lc with time
    "er10",  # sum_10 r / sum_10 |r|, Kaufman's efficiency ratio with a sign
    "didiff14",  # (sum_14 +DM - sum_14 -DM) / sum_14 TR, directional movement
    "aroon25",  # (bars since the low - bars since the high) / 25
    "relvol",  # ln(v + 0.01)
    "vol5_20",  # ln(mean_5 V / mean_20 V), each plus 0.01 mean_60 V
    "cmf20",  # sum_20 CLV V / sum_20 V, Chaikin's money flow
    "mfi14",  # sum_14 sign(change of tp) V / sum_14 V, money flow by volume
    "obv20",  # sum_20 sign(r) V / sum_20 V, on-balance volume
    "volcorr20",  # correlation of |r| with ln(v + 0.01)
    "vwap20",  # (lc - volume-weighted mean_20 of tp) / (s √20)
    "amihud5_60",  # ln(mean_5 a / mean_60 a), each plus 0.001 s, with a = |r| / (v + 0.01); Amihud 2002
)

# Per bar series whose sums over k bars are needed; summed together, which is what makes one window cheap.
_SUMS: dict[int, tuple[str, ...]] = {
    5: ("clv", "lc", "r2", "up", "down", "volume"),
    10: ("r", "abs_r", "r2"),
    14: ("up", "down", "plus_dm", "minus_dm", "tr", "volume", "tp_flow"),
    20: ("lc", "r2", "down2", "hl2", "gk", "rs", "tr", "volume", "clv_volume", "r_flow", "tp_volume"),
    60: ("lc", "r2", "volume"),
}
_TINY = 1e-12  # of logarithms of prices: far below one tick of anything
_NONE = 1e-300  # of volume, whose unit is unknown
_MAX_VOLUME = 1e300  # sums over 60 bars stay finite


def features(ohlcv: Array) -> Array:
    """Compute the features of every bar that has enough history.

    Args:
        ohlcv: float64[n+60,5], open, high, low, close and volume, oldest first, adjusted for splits. Prices above zero,
            volume zero or more, low <= open, close <= high.

    Returns:
        float64[n,50] in the order of `FEATURE_NAMES`; row i belongs to bar i+60. Finite for every valid input.

    Raises:
        ValueError: Wrong shape, fewer than 61 bars, a value that is not finite, a price not above zero, a volume
            below it or above 1e300, or a high below a low.
    """
    bars = _check(ohlcv)
    n = len(bars) - HISTORY
    per_bar = _per_bar(bars)
    now = {name: series[-n:] for name, series in per_bar.items()}
    sums = {k: _sums(per_bar, names, k, n) for k, names in _SUMS.items()}
    s = np.sqrt(np.maximum(sums[60]["r2"] / 60, _TINY**2))
    columns = {
        **_momentum(per_bar["lc"], s, n),
        **_candle(now, sums, s),
        **_volatility(now, sums, s),
        **_moments(per_bar, sums, s, n),
        **_oscillators(per_bar, sums, n),
        **_trend(per_bar, sums, s, n),
        **_volume(per_bar, now, sums, s, n),
    }
    return np.stack([columns[name] for name in FEATURE_NAMES], axis=1)


def latest_window(ohlcv: Array) -> FloatArray:
    """Compute the model's input for the newest bar.

    Args:
        ohlcv: float64[>=120,5], as `features` takes it; older bars than the last 120 change nothing.

    Returns:
        float32[50,60], features by time steps, oldest first.

    Raises:
        ValueError: Fewer than 120 bars, or what `features` refuses.
    """
    if len(ohlcv) < WINDOW_BARS:
        raise ValueError(f"a window needs {WINDOW_BARS} bars, got {len(ohlcv)}")
    return np.ascontiguousarray(features(ohlcv[-WINDOW_BARS:]).T, dtype=np.float32)


def fingerprint() -> str:
    """SHA-256 of what the columns mean: names, order and version of the definition."""
    return hashlib.sha256("\n".join([f"v{DEFINITION_VERSION}", *FEATURE_NAMES]).encode()).hexdigest()


def _check(ohlcv: Array) -> Array:
    bars = np.asarray(ohlcv, dtype=np.float64)
    if bars.ndim != 2 or bars.shape[1] != 5:
        raise ValueError("bars must have five columns: open, high, low, close, volume")
    if len(bars) <= HISTORY:
        raise ValueError(f"features need {HISTORY} bars before the first, got {len(bars)} bars in all")
    if not np.isfinite(bars).all():
        raise ValueError("bars must be finite")
    if (bars[:, :4] <= 0).any() or (bars[:, 4] < 0).any() or (bars[:, 4] > _MAX_VOLUME).any():
        raise ValueError("prices must be above zero, and volume from zero to 1e300")
    if (bars[:, 1] < bars[:, 2]).any():
        raise ValueError("a bar's high is below its low")
    return bars


def _per_bar(bars: Array) -> dict[str, Array]:
    """Everything that belongs to one bar and the bar before; the first entry of a change is zero and never used."""
    volume = np.ascontiguousarray(bars[:, 4])
    lo, lh, ll, lc = np.log(np.ascontiguousarray(bars[:, :4].T))
    tp = (lh + ll + lc) / 3
    previous = np.concatenate([lc[:1], lc[:-1]])
    r, rise, fall = _change(lc), _change(lh), -_change(ll)
    hl, co = lh - ll, lc - lo
    clv = np.where(hl > 0, (2 * lc - lh - ll) / np.maximum(hl, _TINY), 0.0)
    return {
        "lo": lo,
        "lh": lh,
        "ll": ll,
        "lc": lc,
        "tp": tp,
        "volume": volume,
        "previous": previous,
        "r": r,
        "r2": r * r,
        "abs_r": np.abs(r),
        "up": np.maximum(r, 0),
        "down": np.maximum(-r, 0),
        "down2": np.minimum(r, 0) ** 2,
        "hl": hl,
        "co": co,
        "clv": clv,
        "hl2": hl * hl,
        "gk": 0.5 * hl * hl - (2 * np.log(2) - 1) * co * co,
        "rs": (lh - lc) * (lh - lo) + (ll - lc) * (ll - lo),
        "tr": np.maximum(lh, previous) - np.minimum(ll, previous),
        "plus_dm": np.where(rise > fall, np.maximum(rise, 0), 0.0),
        "minus_dm": np.where(fall > rise, np.maximum(fall, 0), 0.0),
        "clv_volume": clv * volume,
        "r_flow": _direction(r) * volume,
        "tp_flow": _direction(_change(tp)) * volume,
        "tp_volume": tp * volume,
    }


def _momentum(lc: Array, s: Array, n: int) -> dict[str, Array]:
    end = len(lc)
    return {f"zret_{k}": (lc[-n:] - lc[end - n - k : end - k]) / (s * np.sqrt(k)) for k in MOMENTUM_BARS}


def _candle(now: dict[str, Array], sums: dict[int, dict[str, Array]], s: Array) -> dict[str, Array]:
    return {
        "gap": (now["lo"] - now["previous"]) / s,
        "body": now["co"] / s,
        "upshadow": (now["lh"] - np.maximum(now["lo"], now["lc"])) / s,
        "dnshadow": (np.minimum(now["lo"], now["lc"]) - now["ll"]) / s,
        "clv": now["clv"],
        "bop": now["co"] / np.maximum(now["hl"], _TINY),
        "clv5": sums[5]["clv"] / 5,
    }


def _volatility(now: dict[str, Array], sums: dict[int, dict[str, Array]], s: Array) -> dict[str, Array]:
    mean_square = {k: sums[k]["r2"] / k for k in (5, 10, 20)}
    by_range = {name: sums[20][key] / 20 for name, key in (("gk20", "gk"), ("rs20", "rs"))}
    atr = sums[20]["tr"] / 20
    return {
        **{f"lvr_{k}": _half_log(square) - np.log(s) for k, square in mean_square.items()},
        "pk20": _half_log(sums[20]["hl2"] / (20 * 4 * np.log(2))) - np.log(s),
        **{name: _half_log(square) - np.log(s) for name, square in by_range.items()},
        "trshock": _log(now["tr"]) - _log(atr),
        "atr20": _log(atr) - np.log(s),
        "lnvol60": np.log(s),
        "downshare20": sums[20]["down2"] / np.maximum(sums[20]["r2"], _TINY**2) - 0.5,
    }


def _moments(per_bar: dict[str, Array], sums: dict[int, dict[str, Array]], s: Array, n: int) -> dict[str, Array]:
    d60 = _demeaned(per_bar["r"], 60, n)
    square = d60 * d60
    variance = np.maximum(square.sum(axis=1) / 60, _TINY**2)
    d20 = _demeaned(per_bar["r"], 20, n)
    lc = _windows(per_bar["lc"], 60, n)
    five = lc[:, 5:] - lc[:, :-5]
    return {
        "skew60": (square * d60).sum(axis=1) / 60 / variance**1.5,
        "lkurt60": np.log(np.maximum((square * square).sum(axis=1) / 60 / variance**2, 1.0)),  # never below 1
        "ac1_20": (d20[:, 1:] * d20[:, :-1]).sum(axis=1) / np.maximum((d20 * d20).sum(axis=1), _TINY**2),
        "lvr5_60": _half_log((five * five).sum(axis=1) / (five.shape[1] * 5)) * 2 - 2 * np.log(s),
    }


def _oscillators(per_bar: dict[str, Array], sums: dict[int, dict[str, Array]], n: int) -> dict[str, Array]:
    k14 = _place_in_channel(per_bar, 14, n + 2)  # two rows more, for the mean of three
    tp = _demeaned(per_bar["tp"], 20, n)
    return {
        **{f"rsi{k}": _balance(sums[k]["up"], sums[k]["down"]) for k in (14, 5)},
        "stochk14": k14[2:],
        "stochd3": (k14[2:] + k14[1:-1] + k14[:-2]) / 3,
        "donch60": _place_in_channel(per_bar, 60, n),
        "cci20": tp[:, -1] / np.maximum(1.5 * np.abs(tp).sum(axis=1) / 20, _TINY),
    }


def _trend(per_bar: dict[str, Array], sums: dict[int, dict[str, Array]], s: Array, n: int) -> dict[str, Array]:
    lc = _demeaned(per_bar["lc"], 20, n)
    deviation = np.sqrt(np.maximum((lc * lc).sum(axis=1), _TINY**2))  # times √20
    time = (np.arange(20) - 9.5) / np.sqrt(20 * (20**2 - 1) / 12)  # of unit length
    mean = {k: sums[k]["lc"] / k for k in (5, 20, 60)}
    lows, highs = _windows(per_bar["ll"], 26, n)[:, ::-1], _windows(per_bar["lh"], 26, n)[:, ::-1]
    return {
        "pctb20": lc[:, -1] * np.sqrt(20) / (2 * deviation),
        "sma5_20": (mean[5] - mean[20]) / (s * np.sqrt(20)),
        "sma20_60": (mean[20] - mean[60]) / (s * np.sqrt(60)),
        "trendcorr20": (lc * time).sum(axis=1) / deviation,
        "er10": sums[10]["r"] / np.maximum(sums[10]["abs_r"], _TINY),
        "didiff14": (sums[14]["plus_dm"] - sums[14]["minus_dm"]) / np.maximum(sums[14]["tr"], _TINY),
        "aroon25": (lows.argmin(axis=1) - highs.argmax(axis=1)) / 25,  # newest first: of equal extremes the last counts
    }


def _volume(
    per_bar: dict[str, Array], now: dict[str, Array], sums: dict[int, dict[str, Array]], s: Array, n: int
) -> dict[str, Array]:
    mean60 = np.maximum(sums[60]["volume"] / 60, _NONE)
    volume14, volume20 = (np.maximum(sums[k]["volume"], _NONE) for k in (14, 20))
    v = _windows(per_bar["volume"], 60, n) / mean60[:, None] + 0.01
    abs_r = _windows(per_bar["abs_r"], 60, n)
    a = abs_r / v
    d_abs_r, d_volume = _centre(np.ascontiguousarray(abs_r[:, -20:])), _centre(np.log(v[:, -20:]))
    spread = np.sqrt((d_abs_r * d_abs_r).sum(axis=1) * (d_volume * d_volume).sum(axis=1))
    vwap = np.where(sums[20]["volume"] > 0, sums[20]["tp_volume"] / volume20, now["lc"])
    return {
        "relvol": np.log(v[:, -1]),
        "vol5_20": np.log(sums[5]["volume"] / 5 / mean60 + 0.01) - np.log(sums[20]["volume"] / 20 / mean60 + 0.01),
        "cmf20": sums[20]["clv_volume"] / volume20,
        "mfi14": sums[14]["tp_flow"] / volume14,
        "obv20": sums[20]["r_flow"] / volume20,
        "volcorr20": (d_abs_r * d_volume).sum(axis=1) / np.maximum(spread, _TINY),
        "vwap20": (now["lc"] - vwap) / (s * np.sqrt(20)),
        "amihud5_60": np.log(np.ascontiguousarray(a[:, -5:]).sum(axis=1) / 5 + 0.001 * s)
        - np.log(a.sum(axis=1) / 60 + 0.001 * s),
    }


def _windows(series: Array, k: int, n: int) -> Array:
    """The last k values at each of the last n bars, [..., n, k], copied."""
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(series, k, axis=-1)[..., -n:, :])


def _sums(per_bar: dict[str, Array], names: tuple[str, ...], k: int, n: int) -> dict[str, Array]:
    stacked = np.stack([per_bar[name] for name in names])
    return dict(zip(names, _windows(stacked, k, n).sum(axis=-1), strict=True))


def _centre(windows: Array) -> Array:
    mean: Array = windows.sum(axis=1, keepdims=True) / windows.shape[1]
    return windows - mean


def _demeaned(series: Array, k: int, n: int) -> Array:
    return _centre(_windows(series, k, n))


def _place_in_channel(per_bar: dict[str, Array], k: int, n: int) -> Array:
    """Where the close stands between the lowest low (-1) and the highest high (+1) of k bars."""
    lowest: Array = _windows(per_bar["ll"], k, n).min(axis=1)
    highest: Array = _windows(per_bar["lh"], k, n).max(axis=1)
    return 2 * (per_bar["lc"][-n:] - lowest) / np.maximum(highest - lowest, _TINY) - 1


def _change(series: Array) -> Array:
    return np.diff(series, prepend=series[:1])


def _direction(change: Array) -> Array:
    return np.where(np.abs(change) > _TINY, np.sign(change), 0.0)  # rounding has no direction


def _balance(up: Array, down: Array) -> Array:
    return (up - down) / np.maximum(up + down, _TINY)


def _log(values: Array) -> Array:
    return np.log(np.maximum(values, _TINY))


def _half_log(squares: Array) -> Array:
    """ln of a root: of a mean square, say."""
    return 0.5 * np.log(np.maximum(squares, _TINY**2))
