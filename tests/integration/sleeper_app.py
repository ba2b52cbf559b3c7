"""The real deployment with a model that only sleeps, as long as each window says, and remembers what it ran."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from ray import serve

from serve_app.contract import CLASSES, MEMBERS, FloatArray, Options, Prediction
from serve_app.deployment import CNNLSTMPredictor


class SleepingEngine:
    """Attributes: ran: numbers of the windows that went through a forward pass, in order; passes: how many passes."""

    name = "sleeping"
    device = "cpu"
    model_name = "sleeping"
    model_version = "1"
    n_params = 0
    remark = ""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.passes = 0

    def warm_up(self) -> None:
        pass

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        started = time.perf_counter()
        self.passes += 1
        self.ran += [int(number) for number in windows[:, 0, 1] if number]
        time.sleep(float(np.maximum(windows[:, 0, 0], 0).sum()) / 1e3)
        one = np.ones(len(windows), np.float32)
        probs = np.full((len(windows), len(CLASSES)), 1 / len(CLASSES), np.float32)
        weights = np.full((len(windows), len(MEMBERS)), 1 / len(MEMBERS), np.float32)
        return Prediction(
            classification_probs=probs,
            regression_pred=windows[:, 0, 1].copy(),
            regression_uncertainty=one if options.return_uncertainty else None,
            aleatoric=one if options.return_uncertainty else None,
            epistemic=0 * one if options.return_uncertainty else None,
            predictive_entropy=one if options.return_uncertainty else None,
            ensemble_weights=weights if options.use_ensemble else None,
            features=None,
            model_name=self.model_name,
            model_version=self.model_version,
            model_time_ms=1e3 * (time.perf_counter() - started),
        )


class Sleeper(CNNLSTMPredictor.func_or_class):
    """The deployment's own class: its queue, deadlines and cancellation are what is under test."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self._engine = SleepingEngine()
        self._left_at: list[float] = []

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """There is nothing to load."""

    async def predict_packed(self, *arguments: Any) -> bytes:
        try:
            packed: bytes = await super().predict_packed(*arguments)
        except asyncio.CancelledError:
            self._left_at.append(time.monotonic())
            raise
        return packed

    async def get_stats(self) -> dict[str, Any]:
        """With what the engine ran, and when (CLOCK_MONOTONIC, one for all processes of a host) callers left."""
        engine = self._engine
        return {**await super().get_stats(), "ran": engine.ran, "passes": engine.passes, "left_at": self._left_at}


def build(arguments: dict[str, Any]) -> serve.Application:
    deployment = serve.deployment(Sleeper).options(
        name="Sleeper", num_replicas=1, max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.1}
    )
    return deployment.bind(**arguments)
