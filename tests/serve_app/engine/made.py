"""Models and windows for the tests of the engines."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from serve_app.bars import SYMBOLS, load_bars
from serve_app.contract import MAX_ABS_VALUE, FloatArray
from serve_app.engine import Engine, load_engine
from serve_app.features import WINDOW_BARS, latest_window
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import Artefact, Manifest, Registry

MANIFEST = Manifest(
    name="cnn_lstm",
    version="3",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    files={},
    feature_names=(),
    features_fingerprint="0" * 64,
    scaler_fingerprint="0" * 64,
    training={"seed": 1, "data_sha256": "0" * 64, "held_out_from": {}},  # type: ignore[arg-type]
)


def random_model() -> HybridModel:
    """Every weight random, so that no output is zero by initialisation."""
    model = HybridModel(ModelConfig())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def artefact_of(model: HybridModel, **changes: Any) -> Artefact:
    weights = safetensors.torch.save({name: t.contiguous() for name, t in model.state_dict().items()})
    artefact = Artefact("cnn_lstm", "3", json.loads(json.dumps(model.config.to_dict())), weights, MANIFEST)
    return dataclasses.replace(artefact, **changes)


@lru_cache(maxsize=1)
def shipped() -> Artefact:
    """The model that ships."""
    return Registry(Path(__file__).parents[3] / "models").load("cnn_lstm")


@lru_cache
def loaded(name: str) -> Engine:
    """An engine with the shipped model, loaded once for all tests."""
    return load_engine(shipped(), engine=name)


@lru_cache(maxsize=1)
def real_windows() -> FloatArray:
    """32 windows of the shipped bars, of all symbols and times."""
    histories = [load_bars(symbol).ohlcv for symbol in SYMBOLS]
    stretches = [
        history[end - WINDOW_BARS : end]
        for history in histories
        for end in np.linspace(WINDOW_BARS, len(history), 7, dtype=int)
    ]
    return np.stack([latest_window(bars) for bars in stretches[:32]])


def extreme_windows() -> FloatArray:
    """All that is allowed and no market shows: nothing, the largest values of either sign, one spike, the smallest."""
    windows = np.zeros((7, 50, 60), np.float32)
    windows[1], windows[2] = MAX_ABS_VALUE, -MAX_ABS_VALUE
    windows[3, 7, 30] = MAX_ABS_VALUE
    windows[4] = np.float32(1e-38)
    windows[5] = np.where(np.indices((50, 60)).sum(axis=0) % 2, MAX_ABS_VALUE, -MAX_ABS_VALUE)
    windows[6] = np.random.default_rng(3).standard_normal((50, 60), dtype=np.float32) * 30
    return windows
