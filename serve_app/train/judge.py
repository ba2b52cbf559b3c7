"""The network beside what it has to beat, on rows that none of them has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serve_app.contract import FloatArray
from serve_app.model import HybridModel
from serve_app.train.baselines import (
    Block,
    Forecast,
    choose_penalties,
    class_prior,
    constant_variance,
    fit_linear,
    gradient_boosting,
)
from serve_app.train.fit import BATCH, FitConfig, answers_of, fit_network, forecast_of, last_bar_block, predict
from serve_app.train.metrics import Interval, Outcomes, block_bootstrap, blocks_of, log_loss_rows, measure, nll_rows
from serve_app.train.samples import Floats, Integers, Samples, Split

MODEL = "CNN+LSTM"
FUSION = "CNN+LSTM, fusion head alone"
PRIOR = "class prior, constant Gaussian"
RIDGE = "ridge mean, constant variance"
LINEAR = "logistic, ridge mean, linear log variance"
BOOSTING = "gradient boosting"

LOSSES: dict[str, Callable[[Forecast, Outcomes], Floats | None]] = {
    "log_loss": lambda forecast, was: None if forecast.probs is None else log_loss_rows(forecast.probs, was.labels),
    "nll": lambda forecast, was: (
        None if forecast.mu is None or forecast.sd is None else nll_rows(forecast.mu, forecast.sd, was.y)
    ),
}


class Bootstrap(NamedTuple):
    """How intervals are drawn: trading days of one block, draws, seed."""

    block_days: int
    draws: int
    seed: int


@dataclass(frozen=True, slots=True)
class Fold:
    """One test block: forecasts by name and what happened.

    Attributes:
        split: The rows.
        outcomes: Of the test rows.
        baselines: Forecasts of the test rows by name.
        networks: The network's, one for each seed.
        fusion: The first network's with its fusion head alone.
        model: The first network.
        epochs: Epoch that each network's weights are from.
    """

    split: Split
    outcomes: Outcomes
    baselines: dict[str, Forecast]
    networks: list[Forecast]
    fusion: Forecast
    model: HybridModel
    epochs: list[int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """All test blocks together.

    Attributes:
        outcomes: What happened.
        forecasts: By name; for `MODEL` the first seed's.
        metrics: By name of model, then of metric; for `MODEL` the mean over seeds.
        by_seed: The metrics of each seed.
        differences: (loss, baseline) → the network's loss less the baseline's, mean over seeds; below zero is better.
    """

    outcomes: Outcomes
    forecasts: dict[str, Forecast]
    metrics: dict[str, dict[str, float]]
    by_seed: list[dict[str, float]]
    differences: dict[tuple[str, str], Interval]


def judge_fold(
    samples: Samples, split: Split, config: FitConfig, seeds: Sequence[int], on_epoch: Callable[[int, int], None]
) -> Fold:
    """Fit networks and baselines on one split and forecast its test rows with each.

    Args:
        samples: Windows and labels.
        split: Rows to learn from, choose by and judge on.
        config: How networks are fitted.
        seeds: One network for each.
        on_epoch: Called with seed and epoch.
    """
    fitted = [
        fit_network(samples, split, config, seed=seed, on_epoch=lambda epoch, seed=seed: on_epoch(seed, epoch))  # type: ignore[misc]
        for seed in seeds
    ]
    models = [model for model, _ in fitted]
    learn, choose, test = blocks_of_split(models[0], samples, split, config)
    return Fold(
        split,
        outcomes_of(samples, split.test),
        forecast_baselines(learn, choose, test.z),
        [forecast_of(model, samples, split.test) for model in models],
        forecast_of(models[0], samples, split.test, use_ensemble=False),
        models[0],
        [epoch for _, epoch in fitted],
    )


def forecast_baselines(learn: Block, choose: Block, z: Floats) -> dict[str, Forecast]:
    """Every baseline's forecast for last bars z[N,F], penalties chosen on `choose`, then fitted on both blocks."""
    both = learn + choose
    linear = fit_linear(both, choose_penalties(learn, choose))
    return {
        PRIOR: class_prior(both, len(z)),
        RIDGE: constant_variance(linear, both, z),
        LINEAR: linear.forecast(z),
        BOOSTING: gradient_boosting(both, z),
    }


def judge(folds: Sequence[Fold], bootstrap: Bootstrap) -> Judgement:
    """Join the folds' test rows and compare."""
    outcomes = Outcomes(*(np.concatenate(part) for part in zip(*(fold.outcomes for fold in folds), strict=True)))
    baselines = {name: _joined([fold.baselines[name] for fold in folds]) for name in folds[0].baselines}
    networks = [_joined(list(of_seed)) for of_seed in zip(*(fold.networks for fold in folds), strict=True)]
    forecasts = {**baselines, MODEL: networks[0], FUSION: _joined([fold.fusion for fold in folds])}
    by_seed = [measure(network, outcomes) for network in networks]
    mean = {metric: float(np.mean([metrics[metric] for metrics in by_seed])) for metric in by_seed[0]}
    return Judgement(
        outcomes,
        forecasts,
        {**{name: measure(forecast, outcomes) for name, forecast in forecasts.items()}, MODEL: mean},
        by_seed,
        compare(networks, baselines, outcomes, bootstrap),
    )


def compare(
    networks: Sequence[Forecast], baselines: dict[str, Forecast], outcomes: Outcomes, bootstrap: Bootstrap
) -> dict[tuple[str, str], Interval]:
    """Differences of every loss that both sides have, row by row, the networks' averaged over seeds."""
    differences = {}
    for name, loss in LOSSES.items():
        ours = np.mean([_present(loss(network, outcomes)) for network in networks], axis=0)
        for baseline, forecast in baselines.items():
            theirs = loss(forecast, outcomes)
            if theirs is not None:
                differences[name, baseline] = block_bootstrap(ours - theirs, outcomes.dates, **bootstrap._asdict())
    return differences


def audit_uncertainty(
    samples: Samples, fold: Fold, config: FitConfig, bootstrap: Bootstrap, *, refits: int
) -> dict[str, float]:
    """What the epistemic deviation is worth: beside refits of the linear part, and on windows that are no market.

    Args:
        samples: Windows and labels.
        fold: Whose first network is audited, on its test rows.
        config: How it was fitted.
        bootstrap: Blocks in which training rows are drawn, and the seed.
        refits: How many draws.

    Returns:
        `share` of the mean variance that is epistemic; `epistemic`, its mean deviation; `refits`, the mean deviation of
        the linear mean over refits; and for each kind of strange window the ratio of its deviation to the usual one.
    """
    usual = answers_of(fold.model, samples, fold.split.test)
    epistemic, aleatoric = usual["epistemic"], usual["aleatoric"]
    strange = _strange_windows(fold.model, samples.windows(fold.split.test[:BATCH]), bootstrap.seed)
    return {
        "share": float(np.square(epistemic).mean() / (np.square(epistemic) + np.square(aleatoric)).mean()),
        "epistemic": float(epistemic.mean()),
        "refits": _deviation_over_refits(samples, fold, config, bootstrap, refits),
        **{kind: float(predict(fold.model, x)["epistemic"].mean() / epistemic.mean()) for kind, x in strange.items()},
    }


def outcomes_of(samples: Samples, rows: Integers) -> Outcomes:
    return Outcomes(samples.labels[rows], samples.y[rows], samples.dates[rows])


def blocks_of_split(
    model: HybridModel, samples: Samples, split: Split, config: FitConfig
) -> tuple[Block, Block, Block]:
    """Training, validation and test rows as the baselines see them."""
    learn, choose, test = (
        last_bar_block(model, samples, rows, config.y_clip) for rows in (split.train, split.validation, split.test)
    )
    return learn, choose, test


def _deviation_over_refits(samples: Samples, fold: Fold, config: FitConfig, bootstrap: Bootstrap, refits: int) -> float:
    learn, choose, test = blocks_of_split(fold.model, samples, fold.split, config)
    penalties = choose_penalties(learn, choose)
    block = blocks_of(samples.dates[fold.split.train], bootstrap.block_days)
    rows_of = [np.flatnonzero(block == number) for number in np.unique(block)]
    rng = np.random.default_rng(bootstrap.seed)
    means = []
    for _ in range(refits):
        drawn = np.concatenate([rows_of[i] for i in rng.integers(0, len(rows_of), len(rows_of))])
        means.append(fit_linear(learn.take(drawn), penalties).forecast(test.z).mu)
    return float(np.std(np.array(means), axis=0, ddof=1).mean())


def _strange_windows(model: HybridModel, x: FloatArray, seed: int) -> dict[str, FloatArray]:
    mean, sd = (buffer.numpy()[:, None] for buffer in (model.normalise.mean, model.normalise.sd))
    z = (x - mean) / sd
    rng = np.random.default_rng(seed)
    return {
        "every feature 5 deviations up": x + 5 * sd,
        "every feature 3 times as far from its mean": mean + 3 * sd * z,
        "features swapped with one another": mean + sd * z[:, rng.permutation(len(mean))],
        "noise of the right mean and deviation": mean + sd * rng.standard_normal(x.shape, dtype=np.float32),
        "every feature at its mean": mean + 0 * x,
    }


def _present(losses: Floats | None) -> Floats:
    assert losses is not None, "a network forecasts both classes and returns"
    return losses


def _joined(forecasts: Sequence[Forecast]) -> Forecast:
    return Forecast(*(_concatenated([getattr(f, name) for f in forecasts]) for name in ("probs", "mu", "sd")))


def _concatenated(parts: Sequence[Floats | None]) -> Floats | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None
