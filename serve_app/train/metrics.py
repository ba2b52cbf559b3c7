"""How good a forecast is, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from serve_app.contract import CLASSES
from serve_app.train.baselines import Forecast
from serve_app.train.samples import DOWN, FLAT, UP, Days, Floats, Integers

COVERAGE_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
ECE_BINS = 15


class Outcomes(NamedTuple):
    """What happened: labels[N], returns y[N] and the days[N] on which the forecasts were made."""

    labels: Integers
    y: Floats
    dates: Days


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and the central 95 % of its bootstrap distribution."""

    mean: float
    low: float
    high: float


def measure(forecast: Forecast, outcomes: Outcomes) -> dict[str, float]:
    """All metrics that the forecast allows, by name."""
    return {**_class_metrics(forecast.probs, outcomes), **_return_metrics(forecast, outcomes)}


def log_loss_rows(probs: Floats, labels: Integers) -> Floats:
    """-ln of the probability given to what happened, float64[N], nats."""
    return -np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12))


def nll_rows(mu: Floats, sd: Floats, y: Floats) -> Floats:
    """Negative log likelihood of a Gaussian, float64[N], nats."""
    rows: Floats = np.log(sd) + 0.5 * np.log(2 * np.pi) + np.square((y - mu) / sd) / 2
    return rows


def coverage(forecast: Forecast, y: Floats, level: float) -> float:
    """Share of returns inside the central Gaussian interval of that level."""
    assert forecast.mu is not None
    assert forecast.sd is not None
    half_width = NormalDist().inv_cdf(0.5 + level / 2) * forecast.sd
    return float((np.abs(y - forecast.mu) <= half_width).mean())


def block_bootstrap(differences: Floats, dates: Days, *, block_days: int, draws: int, seed: int) -> Interval:
    """Mean of per-row differences with an interval that respects dependence.

    Rows of all symbols on the same run of trading days stay together, because their returns move together.

    Args:
        differences: float64[N], e.g. loss of one model less loss of another on the same rows.
        dates: Day of each row.
        block_days: Trading days of one block.
        draws: Bootstrap draws.
        seed: Of the draws.
    """
    block = blocks_of(dates, block_days)
    sums, counts = np.bincount(block, differences), np.bincount(block)
    picks = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


def blocks_of(dates: Days, block_days: int) -> Integers:
    """Number of each row's block: runs of trading days, all symbols together."""
    _, day = np.unique(dates, return_inverse=True)
    return np.asarray(day // block_days, dtype=np.int64)


def volatility_table(forecast: Forecast, y: Floats) -> list[tuple[float, float]]:
    """Predicted and actual root mean square by fifths of predicted deviation, calm to wild."""
    assert forecast.mu is not None
    assert forecast.sd is not None
    fifths = np.array_split(np.argsort(forecast.sd), 5)
    error = y - forecast.mu
    return [(_rms(forecast.sd[rows]), _rms(error[rows])) for rows in fifths]


def _class_metrics(probs: Floats | None, outcomes: Outcomes) -> dict[str, float]:
    if probs is None:
        return {}
    labels = outcomes.labels
    called = probs.argmax(axis=1)
    moved = labels != FLAT
    up_given_move = probs[:, UP] / (probs[:, UP] + probs[:, DOWN])
    return {
        "accuracy": float((called == labels).mean()),
        "macro_f1": float(f1_score(labels, called, average="macro")),
        "log_loss": float(log_loss_rows(probs, labels).mean()),
        "brier": float(np.square(probs - np.eye(len(CLASSES))[labels]).sum(axis=1).mean()),
        "ece": _expected_calibration_error(probs.max(axis=1), called == labels),
        "auc_move": float(roc_auc_score(moved, 1 - probs[:, FLAT])),
        "auc_direction": float(roc_auc_score(labels[moved] == UP, up_given_move[moved])),
    }


def _return_metrics(forecast: Forecast, outcomes: Outcomes) -> dict[str, float]:
    if forecast.mu is None or forecast.sd is None:
        return {}
    y = outcomes.y
    return {
        "nll": float(nll_rows(forecast.mu, forecast.sd, y).mean()),
        "r2": float(1 - np.square(y - forecast.mu).sum() / np.square(y).sum()),
        **{f"coverage_{100 * level:g}": coverage(forecast, y, level) for level in COVERAGE_LEVELS},
    }


def _expected_calibration_error(confidence: Floats, right: np.ndarray) -> float:
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.abs(np.bincount(bins, right - confidence, ECE_BINS))
    return float(gaps.sum() / len(confidence))


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.square(values).mean()))
