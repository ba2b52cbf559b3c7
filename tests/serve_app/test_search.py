"""What a search looks at, what it tries, what its card says; trials on a real Ray are in the integration tests."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from serve_app.bars import SYMBOLS, Bars, load_bars
from serve_app.model import ModelConfig
from serve_app.search import (
    SPACE,
    Choice,
    LogUniform,
    SearchConfig,
    Uniform,
    candidate_of,
    fit_of,
    losses_of,
    samples_to_choose_by,
)
from serve_app.train import FitConfig, TrainConfig
from serve_app.train.samples import make_samples, walk_forward
from serve_app.train.search_card import SearchReport, TrialRow, render

TRAIN = TrainConfig(
    fit=FitConfig(model=ModelConfig(channels=4, width=8, lstm_hidden=8, head_hidden=8), max_epochs=1), n_seeds=2
)
FIRST_TEST_DAY = np.datetime64("2006-07-01")


def all_bars() -> list[Bars]:
    return [load_bars(symbol) for symbol in SYMBOLS]


def poisoned(bars: Bars) -> Bars:
    """The same until the first test block begins, and no numbers from then on."""
    return Bars(bars.symbol, bars.dates, np.where(bars.dates[:, None] < FIRST_TEST_DAY, bars.ohlcv, np.nan))


def test_rows_are_those_of_the_first_fold() -> None:
    samples, split = samples_to_choose_by(TRAIN, all_bars())
    everything = make_samples(all_bars(), horizon=TRAIN.horizon, threshold=TRAIN.threshold)
    fold = walk_forward(everything, TRAIN.test_starts, validation_days=365, embargo_days=10)[0]
    for ours, its in ((split.train, fold.train), (split.validation, fold.validation)):
        np.testing.assert_array_equal(samples.windows(ours), everything.windows(its))
        np.testing.assert_array_equal(samples.y[ours], everything.y[its])


def test_no_row_of_any_test_block_is_there_to_be_looked_at() -> None:
    samples, split = samples_to_choose_by(TRAIN, all_bars())
    assert len(split.test) == 0
    assert samples.label_dates.max() < FIRST_TEST_DAY
    folds = walk_forward(
        make_samples(all_bars(), horizon=1, threshold=0.4), TRAIN.test_starts, validation_days=365, embargo_days=10
    )
    later = [fold for fold in folds[1:] if len(np.intersect1d(fold.validation, folds[0].test))]
    assert later, "which is why no later fold's validation block is used"


def test_what_happens_in_the_test_blocks_does_not_change_a_loss() -> None:
    bars = [b for b in all_bars() if b.symbol == "IBM"]
    losses = [
        losses_of({"learning_rate": 1e-3}, TRAIN, *samples_to_choose_by(TRAIN, of))
        for of in (bars, [poisoned(b) for b in bars])
    ]
    assert losses[0] == losses[1]
    assert all(math.isfinite(loss) for loss in losses[0])
    assert losses[0][0] != losses[0][1], "one network for each seed"


def test_the_baseline_is_the_settings_at_hand_and_lies_in_the_space() -> None:
    base = FitConfig()
    candidate = candidate_of(base, SPACE)
    assert fit_of(candidate, base) == base
    for name, values in SPACE.items():
        match values:
            case Uniform() | LogUniform():
                assert values.low <= candidate[name] <= values.high
            case Choice():
                assert candidate[name] in values.options


def test_a_candidates_width_is_that_of_the_whole_network() -> None:
    fit = fit_of({"width": 16, "learning_rate": 1e-4, "head_dropout": 0.1}, FitConfig())
    assert (fit.model.width, fit.model.lstm_hidden, fit.model.head_hidden) == (16, 16, 16)
    assert (fit.learning_rate, fit.model.head_dropout) == (1e-4, 0.1)
    assert fit.weight_decay == FitConfig().weight_decay


def test_one_trial_is_no_search() -> None:
    with pytest.raises(ValueError, match="2 trials"):
        SearchConfig(n_trials=1)


def report(*trials: TrialRow, best: int) -> SearchReport:
    return SearchReport(
        space={"learning_rate": "0.0001 to 0.002"},
        trials=list(trials),
        best=best,
        seeds=[0, 1],
        max_epochs=5,
        train_rows=3730,
        validation_rows=972,
        validation_from="2005-07-01",
        validation_until="2006-06-20",
        first_test_day="2006-07-01",
        wall_time_s=90.0,
    )


BASE = TrialRow(0, {"learning_rate": 5e-4}, "done", (2.58, 2.60), 30.0)
BETTER = TrialRow(1, {"learning_rate": 1e-3}, "done", (2.56, 2.59), 31.0)
MIXED = TrialRow(1, {"learning_rate": 1e-3}, "done", (2.50, 2.61), 31.0)
FAILED = TrialRow(2, {"learning_rate": 2e-3}, "failed", (), 3.0, "out of | memory")


def test_the_card_has_every_trial_and_says_what_its_choice_is_worth() -> None:
    card = render(report(BASE, BETTER, FAILED, best=1))
    assert "| 0, baseline | 0.0005 | 2.5900 | 2.5800 to 2.6000 | 30 |" in card
    assert "| **1** | 0.001 | 2.5750 |" in card
    assert "failed: out of / memory" in card
    assert "0.0150 nats below the baseline" in card
    assert "+0.0100 to +0.0200" in card
    assert "too good to be true" in card
    assert "No bar from 2006-07-01 on" in card.replace("\n", " ")
    assert "may be chance" not in card


def test_a_winner_that_one_seed_disowns_may_be_chance() -> None:
    assert "may be chance" in render(report(BASE, MIXED, best=1))


def test_a_baseline_that_stays_or_failed_is_said_to() -> None:
    assert "No trial did better" in render(report(BASE, FAILED, best=0))
    assert "The baseline failed" in render(report(replace(BASE, status="failed", losses=()), BETTER, best=1))


def test_settings_come_back_from_their_file_as_they_were() -> None:
    fit = fit_of({"width": 48, "weight_decay": 0.3}, FitConfig())
    assert FitConfig.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
    assert FitConfig.from_dict({"weight_decay": 0}).weight_decay == 0


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"max_epochs": 2.5}, "max_epochs"),
        ({"max_epochs": True}, "max_epochs"),
        ({"model": {"depth": 3}}, "depth"),
        ({"model": {"width": 33}}, "width"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        FitConfig.from_dict(settings)
