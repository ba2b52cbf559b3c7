"""Metrics against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.train.baselines import Forecast
from serve_app.train.metrics import Outcomes, block_bootstrap, coverage, measure, nll_rows, volatility_table
from serve_app.train.pictures import coverage_picture, reliability_picture

N = 20_000
RNG = np.random.default_rng(0)
DAYS = np.datetime64("2010-01-01") + np.arange(N) // 5
SD = RNG.uniform(0.5, 2.0, N)
Y = SD * RNG.standard_normal(N)
HONEST = RNG.dirichlet([4, 4, 4], N)
LABELS = (RNG.random(N)[:, None] > HONEST.cumsum(axis=1)).sum(axis=1)
OUTCOMES = Outcomes(LABELS, Y, DAYS)
TRUE = Forecast(HONEST, np.zeros(N), SD)


def test_a_uniform_forecast_loses_the_logarithm_of_three() -> None:
    metrics = measure(Forecast(np.full((N, 3), 1 / 3)), OUTCOMES)
    assert metrics["log_loss"] == pytest.approx(np.log(3))
    assert metrics["brier"] == pytest.approx(2 / 3)
    assert metrics["auc_move"] == pytest.approx(0.5)
    assert "nll" not in metrics


def test_honest_chances_are_calibrated_and_sharpened_ones_are_not() -> None:
    sharpened = HONEST**3 / (HONEST**3).sum(axis=1, keepdims=True)
    assert measure(TRUE, OUTCOMES)["ece"] < 0.01
    assert measure(Forecast(sharpened), OUTCOMES)["ece"] > 0.1
    assert measure(Forecast(sharpened), OUTCOMES)["log_loss"] > measure(TRUE, OUTCOMES)["log_loss"]


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_intervals_of_the_true_law_cover_what_they_say(level: float) -> None:
    assert coverage(TRUE, Y, level) == pytest.approx(level, abs=0.01)
    assert coverage(Forecast(mu=TRUE.mu, sd=SD / 2), Y, level) < level - 0.1


def test_the_true_deviation_has_the_least_likelihood_loss() -> None:
    zero = np.zeros(N)
    assert nll_rows(zero, SD, Y).mean() < nll_rows(zero, np.full(N, Y.std()), Y).mean()
    assert nll_rows(np.zeros(1), np.ones(1), np.zeros(1))[0] == pytest.approx(0.5 * np.log(2 * np.pi))


def test_r2_is_against_a_forecast_of_zero() -> None:
    assert measure(Forecast(mu=np.zeros(N), sd=SD), OUTCOMES)["r2"] == pytest.approx(0)
    assert measure(Forecast(mu=Y.copy(), sd=SD), OUTCOMES)["r2"] == pytest.approx(1)


def test_fifths_run_from_calm_to_wild_and_agree_with_the_truth() -> None:
    predicted, actual = np.array(volatility_table(TRUE, Y)).T
    assert (np.diff(predicted) > 0).all()
    assert actual == pytest.approx(predicted, rel=0.05)


def test_copies_of_the_same_days_do_not_shrink_the_interval() -> None:
    """Five stocks that move as one are one observation a day, not five."""
    days = np.datetime64("2010-01-01") + np.arange(1000)
    difference = RNG.standard_normal(1000)
    settings = {"block_days": 20, "draws": 1000, "seed": 0}
    one = block_bootstrap(difference, days, **settings)
    five = block_bootstrap(np.tile(difference, 5), np.tile(days, 5), **settings)
    assert (five.low, five.high) == pytest.approx((one.low, one.high))
    assert one.low < one.mean < one.high


def test_dependence_within_blocks_widens_the_interval() -> None:
    days = np.datetime64("2010-01-01") + np.arange(2000)
    independent = RNG.standard_normal(2000)
    persistent = np.repeat(RNG.standard_normal(100), 20)
    settings = {"block_days": 20, "draws": 500, "seed": 0}
    narrow, wide = (block_bootstrap(d, days, **settings) for d in (independent, persistent))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_pictures_are_png_and_the_same_every_time() -> None:
    for draw in (
        lambda: reliability_picture({"model": TRUE}, OUTCOMES),
        lambda: coverage_picture({"model": TRUE, "linear": TRUE}, Y),
    ):
        assert draw().startswith(b"\x89PNG\r\n")
        assert draw() == draw()
