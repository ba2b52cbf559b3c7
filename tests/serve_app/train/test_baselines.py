"""The baselines find what was planted for them, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.train.baselines import (
    LOGISTIC_STRENGTHS,
    RIDGE_PENALTIES,
    Block,
    Penalties,
    choose_penalties,
    class_prior,
    constant_variance,
    fit_linear,
    gradient_boosting,
)
from serve_app.train.metrics import log_loss_rows


def planted(n: int, seed: int = 0) -> Block:
    """Mean 0.5 z0, log variance -1 + 0.8 z1, classes from the return."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 4))
    y = 0.5 * z[:, 0] + np.exp((-1 + 0.8 * z[:, 1]) / 2) * rng.standard_normal(n)
    return Block(z, np.digitize(y, [-0.4, 0.4]).astype(np.int64), y)


def test_the_linear_model_recovers_mean_and_variance() -> None:
    linear = fit_linear(planted(20_000), Penalties(1.0, 1.0))
    assert linear.weights[:, -2] == pytest.approx([0.5, 0, 0, 0], abs=0.02)
    # The penalty of 0.02 |w|² draws 0.8 down to 0.7: the curvature of the likelihood there is about 0.5.
    assert linear.weights[:, -1] == pytest.approx([0, 0.74, 0, 0], abs=0.04)
    assert linear.bias[-1] == pytest.approx(-1, abs=0.06)


def test_linear_chances_beat_the_prior_where_there_is_a_signal() -> None:
    learn, test = planted(5_000), planted(5_000, seed=1)
    linear = fit_linear(learn, choose_penalties(learn, planted(2_000, seed=2))).forecast(test.z)
    prior = class_prior(learn, len(test.y))
    boosting = gradient_boosting(learn, test.z)
    for forecast in (linear, boosting):
        assert forecast.probs.sum(axis=1) == pytest.approx(np.ones(len(test.y)))
        gain = log_loss_rows(prior.probs, test.labels) - log_loss_rows(forecast.probs, test.labels)
        assert gain.mean() > 0.1


def test_penalties_are_strong_for_noise_and_weak_for_a_signal() -> None:
    rng = np.random.default_rng(0)
    noise = [Block(rng.standard_normal((500, 50)), rng.integers(0, 3, 500), rng.standard_normal(500)) for _ in range(2)]
    assert choose_penalties(*noise).logistic_strength == LOGISTIC_STRENGTHS[0]
    signal = choose_penalties(planted(5_000), planted(2_000, seed=1))
    assert signal.logistic_strength > 100 * LOGISTIC_STRENGTHS[0]
    assert signal.ridge_penalty == RIDGE_PENALTIES[0]


def test_the_prior_is_the_frequencies_and_moments_of_what_it_saw() -> None:
    block = Block(np.zeros((4, 1)), np.array([0, 1, 1, 2]), np.array([-1.0, 0.0, 0.0, 3.0]))
    forecast = class_prior(block, 2)
    assert forecast.probs == pytest.approx(np.array([[0.25, 0.5, 0.25]] * 2))
    assert forecast.mu == pytest.approx([0.5, 0.5])
    assert forecast.sd == pytest.approx([np.std([-1, 0, 0, 3])] * 2)


def test_constant_variance_is_that_of_the_residuals() -> None:
    block = planted(2_000)
    linear = fit_linear(block, Penalties(1.0, 1.0))
    forecast = constant_variance(linear, block, block.z[:3])
    assert forecast.probs is None
    assert forecast.sd == pytest.approx([np.std(block.y - linear.forecast(block.z).mu)] * 3)
