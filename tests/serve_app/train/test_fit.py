"""Fitting: what is planted is learned, what is shuffled is not, and each step does what it says."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from serve_app.bars import SYMBOLS, load_bars
from serve_app.model import HybridModel, Members, ModelConfig
from serve_app.train.baselines import choose_penalties, class_prior, fit_linear
from serve_app.train.fit import (
    FitConfig,
    fit_network,
    forecast_of,
    judge_members,
    last_bar_block,
    scale_variance,
    set_ensemble_weights,
    set_normaliser,
    start_highway,
)
from serve_app.train.metrics import log_loss_rows, nll_rows
from serve_app.train.samples import Floats, Samples, Split, make_samples, walk_forward

F, T = 4, 16
SMALL = ModelConfig(
    n_features=F,
    n_steps=T,
    channels=8,
    width=16,
    lstm_hidden=16,
    head_hidden=16,
    backbone_dropout=0.0,
    head_dropout=0.1,
    highway_dropout=0.1,
)
CONFIG = FitConfig(model=SMALL, max_epochs=6, learning_rate=4e-3, weight_decay=0.01)
NOISE = 0.3
KERNEL = np.array([1.0, -1.0, 1.0]) / np.sqrt(3)  # 4 to 6 bars ago: nothing of it is in the last bar


def planted(n: int = 16_000) -> tuple[Samples, Floats]:
    """White noise whose motif some bars ago is the return to come, and that return's mean."""
    rng = np.random.default_rng(5)
    table = rng.standard_normal((n + T, F)).astype(np.float32)
    ends = np.arange(T, n + T)
    mean = sum(weight * table[ends - 4 - lag, 1] for lag, weight in enumerate(KERNEL)).astype(np.float64)
    y = mean + NOISE * rng.standard_normal(n)
    days = np.datetime64("2000-01-01") + np.arange(n)
    return Samples(table, ends, y, np.digitize(y, [-0.43, 0.43]).astype(np.int64), days, days + 1, T), mean


SPLIT = Split("planted", np.arange(12_000), np.arange(12_000, 13_500), np.arange(13_500, 16_000))


def bayes_log_loss(samples: Samples, mean: Floats) -> float:
    cdf = np.vectorize(NormalDist(0, NOISE).cdf)
    below, above = cdf(-0.43 - mean), 1 - cdf(0.43 - mean)
    return float(log_loss_rows(np.column_stack([below, 1 - below - above, above]), samples.labels[SPLIT.test]).mean())


def test_a_planted_motif_is_learned_that_no_last_bar_shows() -> None:
    samples, mean = planted()
    model, epoch = fit_network(samples, SPLIT, CONFIG, seed=0)

    labels = samples.labels[SPLIT.test]
    learn, choose, test = (
        last_bar_block(model, samples, rows, 5.0) for rows in (SPLIT.train, SPLIT.validation, SPLIT.test)
    )
    prior = log_loss_rows(class_prior(learn, len(labels)).probs, labels).mean()
    linear = fit_linear(learn, choose_penalties(learn, choose)).forecast(test.z)
    possible = prior - bayes_log_loss(samples, mean[SPLIT.test])
    network = forecast_of(model, samples, SPLIT.test)

    assert epoch > 0
    assert prior - log_loss_rows(linear.probs, labels).mean() < 0.05 * possible
    assert prior - log_loss_rows(network.probs, labels).mean() > 0.85 * possible
    assert np.corrcoef(network.mu, mean[SPLIT.test])[0, 1] > 0.95


def test_shuffled_labels_are_not_learned() -> None:
    samples, _ = planted(16_000)
    learned_from = np.concatenate([SPLIT.train, SPLIT.validation])
    order = np.random.default_rng(0).permutation(len(learned_from))
    labels, y = samples.labels.copy(), samples.y.copy()
    labels[learned_from], y[learned_from] = labels[learned_from][order], y[learned_from][order]
    shuffled = replace(samples, labels=labels, y=y)
    model, _ = fit_network(shuffled, SPLIT, replace(CONFIG, max_epochs=2), seed=0)
    assert_no_better_than_prior(model, shuffled, SPLIT)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shuffled_labels_of_real_bars_are_not_learned() -> None:
    samples = make_samples([load_bars(symbol) for symbol in SYMBOLS], horizon=1, threshold=0.4)
    split = walk_forward(samples, ["2010-07-01"], validation_days=365, embargo_days=10)[0]
    learned_from = np.concatenate([split.train, split.validation])
    order = np.random.default_rng(0).permutation(learned_from)
    labels, y = samples.labels.copy(), samples.y.copy()
    labels[learned_from], y[learned_from] = samples.labels[order], samples.y[order]
    shuffled = replace(samples, labels=labels, y=y)
    assert_no_better_than_prior(fit_network(shuffled, split, FitConfig(), seed=0)[0], shuffled, split)


def assert_no_better_than_prior(model: HybridModel, samples: Samples, split: Split) -> None:
    learn = last_bar_block(model, samples, np.concatenate([split.train, split.validation]), 5.0)
    labels, y = samples.labels[split.test], samples.y[split.test]
    prior, network = class_prior(learn, len(labels)), forecast_of(model, samples, split.test)
    assert log_loss_rows(network.probs, labels).mean() > log_loss_rows(prior.probs, labels).mean() - 0.003
    assert nll_rows(network.mu, network.sd, y).mean() > nll_rows(prior.mu, prior.sd, y).mean() - 0.003


def test_training_starts_at_the_linear_model_and_takes_its_scale_from_training_rows() -> None:
    samples, _ = planted(600)
    train, validation = np.arange(400), np.arange(400, 600)
    model = HybridModel(SMALL)
    set_normaliser(model, samples, train)
    x = samples.last_bars(train).astype(np.float64)
    assert model.normalise.mean.numpy() == pytest.approx(x.mean(axis=0), abs=1e-6)
    assert model.normalise.sd.numpy() == pytest.approx(x.std(axis=0), rel=1e-5)

    blocks = [last_bar_block(model, samples, rows, 5.0) for rows in (train, validation)]
    linear = fit_linear(blocks[0], choose_penalties(*blocks))
    start_highway(model, linear)
    members = judge_members(model, samples, validation)
    expected = linear.forecast(blocks[1].z)
    for member in range(3):
        assert members.logits[member].softmax(dim=1).numpy() == pytest.approx(expected.probs, abs=1e-5)
        assert members.mu[member].numpy() == pytest.approx(expected.mu, abs=1e-5)
        assert (members.log_var[member] / 2).exp().numpy() == pytest.approx(expected.sd, rel=1e-4)


def test_the_member_that_forecasts_better_gets_more_weight() -> None:
    samples, mean = planted(2000)
    rows = np.arange(2000)
    model = HybridModel(SMALL)
    flat = torch.zeros(2000, 3)
    mu = torch.stack([torch.zeros(2000), torch.from_numpy(mean).float(), torch.zeros(2000)])
    members = Members(torch.stack([flat] * 3), mu, torch.zeros(3, 2000))
    set_ensemble_weights(model, members, samples, rows, CONFIG)
    weights = model.ensemble_logits.softmax(dim=0)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[1] > 0.9
    assert weights.min() > 1 / 2003 * 0.99, "the prior is worth one row to every member"
    same = Members(members.logits, mu[:1].expand(3, -1), members.log_var)
    set_ensemble_weights(model, same, samples, rows, CONFIG)
    assert model.ensemble_logits.softmax(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_the_variance_factor_puts_residuals_on_the_scale_of_their_deviation() -> None:
    samples, _ = planted(1000)
    samples = replace(samples, y=samples.y / 3)  # a new model's deviation is one
    rows = np.arange(1000)
    model = HybridModel(SMALL)
    set_normaliser(model, samples, rows)
    scale_variance(model, samples, rows, CONFIG)
    forecast = forecast_of(model.fold(), samples, rows)
    assert np.square((samples.y - forecast.mu) / forecast.sd).mean() == pytest.approx(1, abs=0.01)


def test_a_seed_decides_the_weights_and_leaves_other_randomness_alone() -> None:
    samples, _ = planted(600)
    split = Split("small", np.arange(400), np.arange(400, 500), np.arange(500, 600))
    config = replace(CONFIG, max_epochs=1)
    torch.manual_seed(42)
    expected = torch.rand(3)
    torch.manual_seed(42)
    first = fit_network(samples, split, config, seed=1).model.state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = (fit_network(samples, split, config, seed=seed).model.state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lstm.project.weight"], other["lstm.project.weight"])
