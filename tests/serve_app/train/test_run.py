"""A small run end to end: what it leaves loads, answers as it was judged, and says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve_app.artefacts import scaler_fingerprint
from serve_app.bars import data_hash, load_bars
from serve_app.contract import N_FEATURES, N_STEPS, Options
from serve_app.engine import load_engine
from serve_app.features import FEATURE_NAMES, latest_window
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import Registry
from serve_app.train import FitConfig, TrainConfig, Trained, train
from serve_app.train.card import render
from serve_app.train.judge import BOOSTING, LINEAR, MODEL, PRIOR, RIDGE
from serve_app.train.metrics import Interval

CONFIG = TrainConfig(
    fit=FitConfig(model=ModelConfig(channels=4, width=8, lstm_hidden=4, head_hidden=8), max_epochs=1),
    symbols=("GOOG", "FB"),
    test_starts=("2009-07-01", "2011-07-01"),
    n_seeds=2,
    bootstrap_draws=100,
    bootstrap_refits=3,
)


class Run:
    """One run and everything that was seen of it."""

    def __init__(self, root: Path) -> None:
        self.registry = Registry(root / "models")
        self.output = root / "output"
        self.progress: list[tuple[str, int, int]] = []
        ticks = iter(range(100))
        self.trained: Trained = train(
            CONFIG,
            registry=self.registry,
            output=self.output,
            progress=lambda *told: self.progress.append(told),
            clock=lambda: 60.0 * next(ticks),
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def test_the_version_is_sealed_with_its_origin(run: Run) -> None:
    assert run.trained.version == "1"
    manifest = run.registry.verify("cnn_lstm", "1")
    assert set(manifest.files) == {
        "model.safetensors",
        "config.json",
        "CARD.md",
        "metrics.json",
        "reliability.png",
        "coverage.png",
    }
    assert manifest.feature_names == FEATURE_NAMES
    assert manifest.training.seed == CONFIG.seed
    assert manifest.training.data_sha256 == data_hash()
    assert {symbol: str(day) for symbol, day in manifest.training.held_out_from.items()} == {
        symbol: str(load_bars(symbol).dates[-60]) for symbol in CONFIG.symbols
    }


def test_the_same_files_stand_in_the_output_folder(run: Run) -> None:
    assert {file.name: file.read_bytes() for file in run.output.iterdir()} == run.trained.files


def test_what_was_published_serves(run: Run) -> None:
    artefact = run.registry.load("cnn_lstm")
    engine = load_engine(artefact)
    window = latest_window(load_bars("GOOG").ohlcv)
    assert window.shape == (N_FEATURES, N_STEPS)
    prediction = engine.predict(window[np.newaxis], Options())
    prediction.check()
    assert engine.n_params == run.trained.report.n_params
    model = HybridModel(ModelConfig.from_dict(artefact.config))
    assert scaler_fingerprint(model) != artefact.manifest.scaler_fingerprint, "an untrained scaler is another"


def test_the_same_seed_gives_the_same_bytes(run: Run) -> None:
    again = train(CONFIG)
    for name in ("model.safetensors", "config.json", "reliability.png", "coverage.png"):
        assert again.files[name] == run.trained.files[name], name
    assert again.version is None


def test_progress_only_rises_and_ends_at_its_total(run: Run) -> None:
    done = [told[1] for told in run.progress]
    assert done == sorted(set(done))
    assert {told[2] for told in run.progress} == {done[-1]} == {5}


def test_the_card_has_model_and_baselines_side_by_side(run: Run) -> None:
    card = run.trained.files["CARD.md"].decode()
    results = card.split("## Out of sample")[1].split("##")[0]
    for name in (MODEL, PRIOR, RIDGE, LINEAR, BOOSTING):
        assert f"{name} |" in results or f"{name}** |" in results
        figure = run.trained.report.metrics[name].get("log_loss", run.trained.report.metrics[name].get("nll"))
        assert f"{figure:.4f}" in results
    assert "no trading edge" in card
    assert data_hash() in card
    assert "reliability.png" in card


def test_figures_are_there_for_machines_too(run: Run) -> None:
    figures = json.loads(run.trained.files["metrics.json"])
    assert figures["metrics"][MODEL]["log_loss"] == run.trained.report.metrics[MODEL]["log_loss"]
    assert figures["differences"][f"log_loss, {PRIOR}"]["low"] == run.trained.report.differences["log_loss", PRIOR].low
    assert figures["wall_time_s"] == 60.0


def test_differences_are_those_of_the_table(run: Run) -> None:
    report = run.trained.report
    for (loss, name), difference in report.differences.items():
        assert difference.mean == pytest.approx(report.metrics[MODEL][loss] - report.metrics[name][loss])
        assert difference.low <= difference.mean <= difference.high


def test_a_missed_aim_is_called_missed(run: Run) -> None:
    report = run.trained.report
    worse = {**report.differences, ("log_loss", PRIOR): Interval(-0.001, -0.004, 0.002)}
    worse["log_loss", LINEAR] = Interval(0.004, 0.003, 0.005)
    metrics = {**report.metrics, MODEL: {**report.metrics[MODEL], "coverage_90": 0.95}}
    aims = render(replace(report, differences=worse, metrics=metrics)).split("## Aims")[1].split("##")[0]
    assert aims.count("**missed**") == 3
    better = {**worse, ("log_loss", PRIOR): Interval(-0.01, -0.02, -0.001), ("log_loss", LINEAR): Interval(0, 0, 0)}
    metrics[MODEL]["coverage_90"] = 0.9
    aims = render(replace(report, differences=better, metrics=metrics)).split("## Aims")[1].split("##")[0]
    assert "missed" not in aims
    assert "+0.0100 [+0.0010, +0.0200]" in aims, "a gain is a loss that fell"


def test_the_audit_shows_that_size_and_not_sense_moves_the_epistemic_part(run: Run) -> None:
    audit = run.trained.report.audit
    assert audit["every feature 5 deviations up"] > 2
    assert audit["every feature at its mean"] < 1
    assert 0 < audit["share"] < 0.1
    assert 0.2 < audit["epistemic"] / audit["refits"] < 5


def test_a_symbol_without_bars_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="'TSLA'"):
        train(replace(CONFIG, symbols=("TSLA",)))
