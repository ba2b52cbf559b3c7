"""The whole run: samples, folds, judgement, refit, card, publication."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import sklearn
import torch

from serve_app.artefacts import scaler_fingerprint
from serve_app.bars import SYMBOLS, Bars, data_hash, load_bars
from serve_app.contract import MEMBERS, MODEL_NAME
from serve_app.features import FEATURE_NAMES, fingerprint
from serve_app.model import HybridModel
from serve_app.registry import CONFIG, WEIGHTS, Registry
from serve_app.train.baselines import class_prior
from serve_app.train.card import Refit, Report, render
from serve_app.train.fit import FitConfig, fit_network, forecast_of
from serve_app.train.judge import (
    LINEAR,
    MODEL,
    PRIOR,
    RIDGE,
    Bootstrap,
    Fold,
    Judgement,
    audit_uncertainty,
    blocks_of_split,
    judge,
    judge_fold,
    outcomes_of,
)
from serve_app.train.metrics import measure, volatility_table
from serve_app.train.pictures import coverage_picture, reliability_picture
from serve_app.train.samples import Samples, Split, make_samples, split_before, walk_forward


class Progress(Protocol):
    """Told after every epoch; the total is an upper bound, since epochs stop early."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on and how it is judged.

    Attributes:
        fit: How each network is fitted.
        symbols: Whose bars.
        horizon: Bars ahead.
        threshold: Half width of the class "flat", in volatilities.
        test_starts: First day of each fold's test block.
        validation_days: Calendar days before a test block that are kept for choosing.
        embargo_days: Calendar days between the last label of one block and the next block.
        held_out_bars: Last bars of each symbol that the published model never sees.
        seed: Of everything random; the published model's own.
        n_seeds: Networks per fold, with consecutive seeds.
        block_days: Trading days of one bootstrap block.
        bootstrap_draws: Draws behind each interval.
        bootstrap_refits: Linear refits that the epistemic deviation is compared with.
        threads: Of torch; results are the same only for the same number.
    """

    fit: FitConfig = field(default_factory=FitConfig)
    symbols: tuple[str, ...] = SYMBOLS
    horizon: int = 1
    threshold: float = 0.4
    test_starts: tuple[str, ...] = ("2006-07-01", "2008-07-01", "2010-07-01")
    validation_days: int = 365
    embargo_days: int = 10
    held_out_bars: int = 60
    seed: int = 0
    n_seeds: int = 3
    block_days: int = 20
    bootstrap_draws: int = 2000
    bootstrap_refits: int = 20
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run leaves.

    Attributes:
        report: All figures of the card.
        files: Name → bytes of the version: weights, config, card, figures, pictures.
        version: Version in the registry; None when nothing was published.
    """

    report: Report
    files: dict[str, bytes]
    version: str | None


def train(
    config: TrainConfig,
    *,
    registry: Registry | None = None,
    output: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train walk-forward on the shipped bars, judge, refit, and publish with a model card.

    Args:
        config: What and how.
        registry: Where to publish the refit as the next version of `cnn_lstm`; None publishes nothing.
        output: Folder to write the version's files to as well; made when missing.
        progress: Told after every epoch.
        clock: Monotonic seconds.

    Raises:
        ValueError: A symbol that is not shipped.
        RegistryError: The version cannot be published.
    """
    started = clock()
    torch.set_num_threads(config.threads)
    bars = [load_bars(symbol) for symbol in config.symbols]
    samples = make_samples(bars, horizon=config.horizon, threshold=config.threshold)
    bootstrap = Bootstrap(config.block_days, config.bootstrap_draws, config.seed)
    on_epoch = _Epochs(config, progress)
    gaps = {"validation_days": config.validation_days, "embargo_days": config.embargo_days}

    folds = [
        judge_fold(samples, split, config.fit, _seeds(config), on_epoch.of(f"test from {split.name}"))
        for split in walk_forward(samples, config.test_starts, **gaps)
    ]
    judgement = judge(folds, bootstrap)
    held_out_from = {b.symbol: b.dates[-config.held_out_bars] for b in bars}
    model, refit = _refit(samples, split_before(samples, min(held_out_from.values()), **gaps), config, on_epoch)

    report = Report(
        name=MODEL_NAME,
        settings=asdict(config),
        n_params=model.n_params,
        hashes={"data": data_hash(), "features": fingerprint(), "scaler": scaler_fingerprint(model)},
        packages=_packages(),
        symbols={b.symbol: _span(b, held_out_from[b.symbol]) for b in bars},
        metrics=judgement.metrics,
        by_seed=judgement.by_seed,
        differences=judgement.differences,
        by_fold=[_fold_row(samples, fold, judge([fold], bootstrap)) for fold in folds],
        volatility=volatility_table(judgement.forecasts[MODEL], judgement.outcomes.y),
        audit=audit_uncertainty(samples, folds[-1], config.fit, bootstrap, refits=config.bootstrap_refits),
        refit=refit,
        wall_time_s=clock() - started,
    )
    files = _files(report, judgement, model)
    if output is not None:
        _write(output, files)
    return Trained(report, files, None if registry is None else _publish(registry, files, report))


class _Epochs:
    """Counts epochs of all fits for `Progress`; a fit that stops early is made up for when the next begins."""

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._each = config.fit.max_epochs
        self._total = (len(config.test_starts) * config.n_seeds + 1) * self._each
        self._progress = progress
        self._begun: list[tuple[str, int]] = []

    def of(self, stage: str) -> Callable[[int, int], None]:
        def on_epoch(seed: int, epoch: int) -> None:
            if (stage, seed) not in self._begun:
                self._begun.append((stage, seed))
            done = self._begun.index((stage, seed)) * self._each + epoch
            self._progress(f"{stage}, seed {seed}", done, self._total)

        return on_epoch


def _seeds(config: TrainConfig) -> range:
    return range(config.seed, config.seed + config.n_seeds)


def _packages() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


def _span(bars: Bars, held_out_from: np.datetime64) -> dict[str, str | int]:
    return {
        "bars": len(bars),
        "first": str(bars.dates[0]),
        "last": str(bars.dates[-1]),
        "held_out_from": str(held_out_from),
    }


def _fold_row(samples: Samples, fold: Fold, judgement: Judgement) -> dict[str, Any]:
    split = fold.split
    metrics = judgement.metrics
    gain = judgement.differences["log_loss", PRIOR]
    return {
        "first": str(samples.dates[split.test].min()),
        "last": str(samples.dates[split.test].max()),
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        **{f"log_loss, {name}": metrics[name]["log_loss"] for name in (PRIOR, LINEAR, MODEL)},
        "gain": [gain.mean, gain.low, gain.high],
        **{f"nll, {name}": metrics[name]["nll"] for name in (PRIOR, LINEAR, MODEL)},
        "epochs": fold.epochs,
        "coverage_90": metrics[MODEL]["coverage_90"],
        "auc_direction": metrics[MODEL]["auc_direction"],
    }


def _refit(samples: Samples, split: Split, config: TrainConfig, on_epoch: _Epochs) -> tuple[HybridModel, Refit]:
    """The weights to publish, by the recipe that was judged, and how they do on the bars held out."""
    told = on_epoch.of("final refit")
    model, epoch = fit_network(
        samples, split, config.fit, seed=config.seed, on_epoch=lambda epoch: told(config.seed, epoch)
    )
    learn, choose, _ = blocks_of_split(model, samples, split, config.fit)
    outcomes = outcomes_of(samples, split.test)
    return model, Refit(
        train=len(split.train),
        validation=len(split.validation),
        trained_until=str(samples.label_dates[split.train].max()),
        chosen_until=str(samples.label_dates[split.validation].max()),
        epoch=epoch,
        ensemble_weights=dict(zip(MEMBERS, model.ensemble_logits.softmax(dim=0).tolist(), strict=True)),
        held_out=len(split.test),
        held_out_metrics={
            PRIOR: measure(class_prior(learn + choose, len(split.test)), outcomes),
            MODEL: measure(forecast_of(model, samples, split.test), outcomes),
        },
    )


def _files(report: Report, judgement: Judgement, model: HybridModel) -> dict[str, bytes]:
    forecasts, y = judgement.forecasts, judgement.outcomes.y
    called = {name: forecasts[name] for name in (MODEL, LINEAR)}
    spread = {name: forecasts[name] for name in (MODEL, LINEAR, RIDGE)}
    return {
        WEIGHTS: safetensors.torch.save(model.state_dict()),
        CONFIG: _json(model.config.to_dict()),
        "metrics.json": _json(report.to_dict()),
        "CARD.md": render(report).encode(),
        "reliability.png": reliability_picture(called, judgement.outcomes),
        "coverage.png": coverage_picture(spread, y),
    }


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _publish(registry: Registry, files: dict[str, bytes], report: Report) -> str:
    return registry.publish(
        report.name,
        files=files,
        feature_names=FEATURE_NAMES,
        features_fingerprint=report.hashes["features"],
        scaler_fingerprint=report.hashes["scaler"],
        training={
            "seed": report.settings["seed"],
            "data_sha256": report.hashes["data"],
            "held_out_from": {symbol: span["held_out_from"] for symbol, span in report.symbols.items()},
        },
    )


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"
