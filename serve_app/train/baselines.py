"""What a network has to beat: forecasts that need no network.

All of them see the last bar's 50 features at most. Their penalties are chosen on the validation block; then they are
fitted again on training and validation together, which is a year more than the network learns from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression, Ridge

from serve_app.contract import CLASSES
from serve_app.train.samples import Floats, Integers

LOGISTIC_STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RIDGE_PENALTIES = (1e4, 3e4, 1e5, 3e5, 1e6)
LOG_VARIANCE_PENALTY = 0.02


class Penalties(NamedTuple):
    """Of the linear model: inverse strength of the logistic part's, and the ridge's."""

    logistic_strength: float
    ridge_penalty: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What any model says of N rows.

    Attributes:
        probs: float64[N,C], or None from a model of returns only.
        mu: float64[N], expected return, or None from a model of classes only.
        sd: float64[N], its standard deviation, or None likewise.
    """

    probs: Floats | None = None
    mu: Floats | None = None
    sd: Floats | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Normalised last bars z[N,F] with their labels[N] and returns y[N]."""

    z: Floats
    labels: Integers
    y: Floats

    def take(self, rows: Integers) -> Block:
        return Block(self.z[rows], self.labels[rows], self.y[rows])

    def __add__(self, other: Block) -> Block:
        pairs = zip((self.z, self.labels, self.y), (other.z, other.labels, other.y), strict=True)
        z, labels, y = (np.concatenate(pair) for pair in pairs)
        return Block(z, labels, y)


@dataclass(frozen=True, slots=True)
class Linear:
    """Everything linear in the last bar: logits, mean and log variance.

    Attributes:
        weights: float64[F, C+2], columns for the logits, the mean and the log variance.
        bias: float64[C+2].
    """

    weights: Floats
    bias: Floats

    def forecast(self, z: Floats) -> Forecast:
        """Classes and returns for normalised last bars z[N,F]."""
        out = z @ self.weights + self.bias
        odds = np.exp(out[:, :-2] - out[:, :-2].max(axis=1, keepdims=True))
        return Forecast(odds / odds.sum(axis=1, keepdims=True), out[:, -2], np.exp(out[:, -1] / 2))


def class_prior(block: Block, n: int) -> Forecast:
    """The frequencies of the classes and one Gaussian, for each of n rows."""
    counts = np.bincount(block.labels, minlength=len(CLASSES))
    return Forecast(np.tile(counts / counts.sum(), (n, 1)), np.full(n, block.y.mean()), np.full(n, block.y.std()))


def constant_variance(linear: Linear, block: Block, z: Floats) -> Forecast:
    """The linear mean with one variance for all rows."""
    residuals = block.y - np.asarray(linear.forecast(block.z).mu)
    return Forecast(mu=linear.forecast(z).mu, sd=np.full(len(z), residuals.std()))


def choose_penalties(train: Block, validation: Block) -> Penalties:
    """The penalties whose fit on training rows has the least loss on validation rows."""
    return Penalties(
        min(LOGISTIC_STRENGTHS, key=lambda strength: _log_loss(_logistic(train, strength), validation)),
        min(RIDGE_PENALTIES, key=lambda penalty: _mean_square(_ridge(train, penalty), validation)),
    )


def fit_linear(block: Block, penalties: Penalties) -> Linear:
    """Multinomial logistic regression, ridge regression of the mean, and linear regression of the log variance."""
    logits, mean = _logistic(block, penalties.logistic_strength), _ridge(block, penalties.ridge_penalty)
    log_var, log_var_bias = _log_variance(block.z, block.y - mean.predict(block.z))
    return Linear(
        np.column_stack([logits.coef_.T, mean.coef_, log_var]),
        np.concatenate([logits.intercept_, [mean.intercept_, log_var_bias]]),
    )


def gradient_boosting(block: Block, z: Floats) -> Forecast:
    """Boosted trees on the 50 features, with settings for faint signals."""
    model = HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.03, max_leaf_nodes=8, min_samples_leaf=200, l2_regularization=10.0, random_state=0
    )
    return Forecast(model.fit(block.z, block.labels).predict_proba(z))


def _logistic(block: Block, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000).fit(block.z, block.labels)


def _ridge(block: Block, penalty: float) -> Ridge:
    return Ridge(alpha=penalty).fit(block.z, block.y)


def _log_loss(model: LogisticRegression, block: Block) -> float:
    probs = model.predict_proba(block.z)
    return float(-np.log(probs[np.arange(len(block.labels)), block.labels]).mean())


def _mean_square(model: Ridge, block: Block) -> float:
    return float(np.square(block.y - model.predict(block.z)).mean())


def _log_variance(z: Floats, residuals: Floats) -> tuple[Floats, float]:
    """Weights and bias of ln var = z·w + b that make the mean of (ln var + e²/var)/2, plus l2 |w|², least."""
    square = np.square(residuals)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        w, b = parameters[:-1], parameters[-1]
        log_var = z @ w + b
        scaled = square * np.exp(-log_var)
        slope = (1 - scaled) / (2 * len(z))
        value = (log_var + scaled).mean() / 2 + LOG_VARIANCE_PENALTY * w @ w
        return value, np.append(z.T @ slope + 2 * LOG_VARIANCE_PENALTY * w, slope.sum())

    start = np.append(np.zeros(z.shape[1]), np.log(square.mean()))
    found = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])
