"""Hyper-parameter search on Ray Tune: which settings of a fit have the least validation loss.

    bars before the first test block ─ samples ─┬─ trial 0: the settings at hand, as the baseline
                                                └─ trials 1..N-1: drawn from the space ──► card, config.json

Every trial is one process of the cluster and fits one network per seed. Of the walk-forward folds only the first one's
validation block is used: those of later folds lie inside earlier folds' test blocks. The trials get the bars before
that first test block and no others, so that no test row can be looked at by mistake.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from serve_app.bars import Bars, load_bars
from serve_app.features import WINDOW_BARS
from serve_app.train import FitConfig, TrainConfig
from serve_app.train.fit import fit_network, forecast_of
from serve_app.train.judge import outcomes_of
from serve_app.train.metrics import measure
from serve_app.train.samples import Samples, Split, make_samples, split_before
from serve_app.train.search_card import SearchReport, TrialRow, render

Candidate = dict[str, Any]

# Tune's own files, its own words and its own way with Ctrl-C, which waits for the trials under way, are switched off.
_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

_ERROR_LENGTH = 200


class SearchFailed(Exception):
    """No trial came to an end; the message is one line."""


class Range(Protocol):
    """What one setting may be."""

    def domain(self) -> Any:
        """The same as Ray Tune says it."""


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float

    def domain(self) -> Any:
        return tune.uniform(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class LogUniform:
    low: float
    high: float

    def domain(self) -> Any:
        return tune.loguniform(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}, uniform in its logarithm"


@dataclass(frozen=True)
class Choice:
    options: tuple[int, ...]

    def domain(self) -> Any:
        return tune.choice(list(self.options))

    def __str__(self) -> str:
        return " or ".join(map(str, self.options))


# The highway's dropout is left out: it sets the epistemic scale, which validation loss hardly sees.
SPACE: Mapping[str, Range] = {
    "learning_rate": LogUniform(1e-4, 2e-3),
    "weight_decay": LogUniform(0.01, 0.5),
    "backbone_dropout": Uniform(0.0, 0.5),
    "head_dropout": Uniform(0.1, 0.5),
    "width": Choice((16, 32, 48)),
}

_OF_FIT = ("learning_rate", "weight_decay")
_AS_WIDE = ("width", "lstm_hidden", "head_hidden")


@dataclass(frozen=True)
class SearchConfig:
    """What is searched.

    Attributes:
        train: The run whose fit is to be improved: its data, folds, seeds and, as the baseline, its settings.
        n_trials: Candidates in all, the baseline among them; at least 2.
        space: Ranges by name of the setting.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    n_trials: int = 8
    space: Mapping[str, Range] = field(default_factory=lambda: SPACE)

    def __post_init__(self) -> None:
        if self.n_trials < 2:
            raise ValueError("a search needs at least 2 trials: the baseline and one to compare with it")


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search leaves.

    Attributes:
        report: Every trial and how it was judged.
        best: Settings of least validation loss, to train with.
        files: Name → bytes: the card, `config.json` for `sluice train --config`, all figures.
    """

    report: SearchReport
    best: FitConfig
    files: dict[str, bytes]


def search(
    config: SearchConfig,
    *,
    ray_address: str,
    scratch: Path,
    on_change: Callable[[Sequence[TrialRow]], None] = lambda trials: None,
    clock: Callable[[], float] = time.monotonic,
) -> Searched:
    """Judge candidates on the first fold's validation block, as many at a time as the cluster has CPUs.

    Args:
        config: What and how.
        ray_address: `host:port` of a cluster that this host is a node of; what it asks of drivers, such as the file of
            its token, must be in the environment.
        scratch: Folder for what Ray Tune writes meanwhile; the caller removes it.
        on_change: Told all trials whenever one of them starts, has fitted one more network, ends or fails.
        clock: Monotonic seconds.

    Raises:
        SearchFailed: Every trial failed.
        ValueError: A symbol that is not shipped.
    """
    started = clock()
    samples, split = samples_to_choose_by(config.train, [load_bars(symbol) for symbol in config.train.symbols])
    watch = _Watch(config, on_change, clock)
    os.environ.update(_TUNE_ENV)
    ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are rows of ours, not traces in the terminal
    try:
        _tune(config, samples, split, watch, scratch)
    finally:
        ray.shutdown()
    done = [trial for trial in watch.trials if trial.status == "done"]
    if not done:
        raise SearchFailed(f"every trial failed; the first: {watch.trials[0].error}")
    best = min(done, key=lambda trial: trial.loss)
    fit = fit_of(best.candidate, config.train.fit)
    report = _report(config, samples, split, trials=watch.trials, best=best.number, wall_time_s=clock() - started)
    files = {
        "SEARCH.md": render(report).encode(),
        "config.json": _json(fit.to_dict()),
        "trials.json": _json(asdict(report)),
    }
    return Searched(report, fit, files)


def samples_to_choose_by(config: TrainConfig, bars: Sequence[Bars]) -> tuple[Samples, Split]:
    """The first fold's training and validation rows, made from bars before its test block alone.

    Returns:
        Samples that end before the first test block, and their split, whose test rows are none.
    """
    start = np.datetime64(min(config.test_starts))
    early = [Bars(b.symbol, b.dates[b.dates < start], b.ohlcv[b.dates < start]) for b in bars]
    long_enough = [b for b in early if len(b) > WINDOW_BARS + config.horizon]
    samples = make_samples(long_enough, horizon=config.horizon, threshold=config.threshold)
    gaps = {"validation_days": config.validation_days, "embargo_days": config.embargo_days}
    return samples, split_before(samples, start, **gaps)


def candidate_of(fit: FitConfig, space: Mapping[str, Range]) -> Candidate:
    """What a fit's settings are in the terms of the space."""
    return {name: getattr(fit if name in _OF_FIT else fit.model, name) for name in space}


def fit_of(candidate: Candidate, base: FitConfig) -> FitConfig:
    """The base's settings with a candidate's in their place; its width is also that of the LSTM and of the heads."""
    fit = {name: value for name, value in candidate.items() if name in _OF_FIT}
    model = {name: value for name, value in candidate.items() if name not in _OF_FIT}
    if "width" in model and model["width"] != base.model.width:
        model |= dict.fromkeys(_AS_WIDE, model["width"])
    return replace(base, **fit, model=replace(base.model, **model))


def losses_of(
    candidate: Candidate,
    config: TrainConfig,
    samples: Samples,
    split: Split,
    on_loss: Callable[[list[float]], None] = lambda losses: None,
) -> list[float]:
    """Fit one network per seed and return, for each, log-loss plus NLL of the validation rows in nats, as served."""
    losses: list[float] = []
    for seed in range(config.seed, config.seed + config.n_seeds):
        model, _ = fit_network(samples, split, fit_of(candidate, config.fit), seed=seed)
        figures = measure(forecast_of(model, samples, split.validation), outcomes_of(samples, split.validation))
        losses.append(figures["log_loss"] + figures["nll"])
        on_loss(losses)
    return losses


def _trial(candidate: Candidate, *, config: TrainConfig, samples: Samples, split: Split) -> None:
    """What runs in a process of the cluster, with the one CPU and the one thread that Ray gives it."""
    losses_of(candidate, config, samples, split, lambda losses: tune.report({"losses": list(losses)}))


def _tune(config: SearchConfig, samples: Samples, split: Split, watch: _Watch, scratch: Path) -> None:
    trainable = tune.with_parameters(_trial, config=config.train, samples=samples, split=split)
    baseline = candidate_of(config.train.fit, config.space)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={name: values.domain() for name, values in config.space.items()},
        tune_config=tune.TuneConfig(
            num_samples=config.n_trials,
            search_alg=BasicVariantGenerator(points_to_evaluate=[baseline], random_state=config.train.seed),
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(scratch), verbose=0, callbacks=[watch]),
    ).fit()


class _Watch(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Turns what Ray Tune tells of its trials into rows."""

    def __init__(
        self, config: SearchConfig, on_change: Callable[[Sequence[TrialRow]], None], clock: Callable[[], float]
    ) -> None:
        self._rows: dict[int, TrialRow] = {}
        self._started: dict[int, float] = {}
        self._on_change = on_change
        self._clock = clock
        self._space = config.space

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune saves its callbacks for a restart that we never make; what this one holds cannot be saved."""
        return tune.Callback, ()

    @property
    def trials(self) -> list[TrialRow]:
        return [self._rows[number] for number in sorted(self._rows)]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = _number(trial)
        self._started[number] = self._clock()
        candidate = {name: trial.config[name] for name in self._space}
        self._rows[number] = TrialRow(number, candidate)
        self._on_change(self.trials)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._change(trial, losses=tuple(result["losses"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._change(trial, status="done")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._change(trial, status="failed", error=_last_words(trial.error_file))

    def _change(self, trial: Any, **values: Any) -> None:
        number = _number(trial)
        wall_time_s = self._clock() - self._started[number]
        self._rows[number] = replace(self._rows[number], wall_time_s=wall_time_s, **values)
        self._on_change(self.trials)


def _number(trial: Any) -> int:
    """Ray Tune numbers trials from 0 in the order in which they were drawn, so 0 is the baseline."""
    return int(trial.trial_id.rpartition("_")[2])


def _last_words(error_file: str | None) -> str:
    """The last line of what Ray Tune kept of a failure: the exception itself, below its trace."""
    lines = Path(error_file).read_text().split("\n") if error_file else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason told")[:_ERROR_LENGTH]


def _report(
    config: SearchConfig, samples: Samples, split: Split, *, trials: Sequence[TrialRow], best: int, wall_time_s: float
) -> SearchReport:
    dates = samples.dates[split.validation]
    return SearchReport(
        space={name: str(values) for name, values in config.space.items()},
        trials=list(trials),
        best=best,
        seeds=list(range(config.train.seed, config.train.seed + config.train.n_seeds)),
        max_epochs=config.train.fit.max_epochs,
        train_rows=len(split.train),
        validation_rows=len(split.validation),
        validation_from=str(dates.min()),
        validation_until=str(samples.label_dates[split.validation].max()),
        first_test_day=min(config.train.test_starts),
        wall_time_s=wall_time_s,
    )


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"
