"""Engines without a model: for measuring and for tests of overload, never for a caller."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from serve_app.contract import CLASSES, MEMBERS, FloatArray, Options, Prediction
from serve_app.engine.base import Setup
from serve_app.registry import Artefact


class NoopEngine:
    """Answers a constant at once: for measuring what everything around a model costs."""

    name = "noop"
    device = "cpu"
    model_name = "noop"
    n_params = 0
    remark = ""

    def __init__(self, artefact: Artefact | None, setup: Setup) -> None:
        self.model_version = artefact.version if artefact else "0"

    def warm_up(self) -> None:
        pass

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        return self._constant(len(windows), options)

    def _constant(self, size: int, options: Options) -> Prediction:
        deviation = np.full(size, 0.5, np.float32) if options.return_uncertainty else None
        certain = deviation is None
        return Prediction(
            classification_probs=np.full((size, len(CLASSES)), 1 / len(CLASSES), np.float32),
            regression_pred=np.zeros(size, np.float32),
            regression_uncertainty=None if deviation is None else np.hypot(deviation, deviation),
            aleatoric=deviation,
            epistemic=deviation,
            predictive_entropy=None if certain else np.full(size, np.log(len(CLASSES)), np.float32),
            ensemble_weights=np.full((size, len(MEMBERS)), 1 / len(MEMBERS), np.float32)
            if options.use_ensemble
            else None,
            features=np.zeros((size, 1), np.float32) if options.return_features else None,
            model_name=self.model_name,
            model_version=self.model_version,
            model_time_ms=0.0,
        )


class SleepEngine(NoopEngine):
    """Answers a constant after 10 ms per window: a model of known capacity, 100 windows/s, that takes no CPU."""

    name = "sleep"
    model_name = "sleep"
    window_s = 0.01

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        time.sleep(self.window_s * len(windows))
        return replace(self._constant(len(windows), options), model_time_ms=1000 * self.window_s * len(windows))
