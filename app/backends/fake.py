"""A backend for tests and examples: answers at once, or fails, waits or is not ready, as it is told."""

from __future__ import annotations

import asyncio
from types import EllipsisType
from typing import Any

import numpy as np

from app.backends.base import Answer, BackendStatus, Call
from serve_app.contract import MEMBERS, NotReady, Options, Prediction

_ALL_DEFAULTS = Options()


def fake_prediction(
    n_windows: int, options: Options = _ALL_DEFAULTS, *, version: str = "1", n_features: int = 4
) -> Prediction:
    """A valid prediction whose rows all differ, with what `options` ask for and nothing else.

    Args:
        n_windows: Rows, at least 1.
        options: What the caller asked for.
        version: Model version to name.
        n_features: Fused features per row.
    """
    row = np.arange(n_windows, dtype=np.float32)
    up = (row % 10) / 20
    one = np.ones(n_windows, np.float32)
    uncertainty = one if options.return_uncertainty else None
    return Prediction(
        classification_probs=np.stack([0.75 - up, 0.25 * one, up], axis=1).astype(np.float32),
        regression_pred=row / np.float32(100),
        regression_uncertainty=uncertainty,
        aleatoric=None if uncertainty is None else 0.8 * one,
        epistemic=None if uncertainty is None else 0.6 * one,
        predictive_entropy=uncertainty,
        ensemble_weights=np.full((n_windows, len(MEMBERS)), 1 / 3, np.float32) if options.use_ensemble else None,
        features=np.zeros((n_windows, n_features), np.float32) if options.return_features else None,
        model_name="fake",
        model_version=version,
        model_time_ms=0.0,
    )


class FakeBackend:
    """Answers every call with `fake_prediction`.

    Args:
        name: Arm to stand for.
        version: Model version that its answers name.

    Attributes:
        calls: Every call that arrived, in order.
        error: Raised by every call while it is set.
        errors: Raised by calls for these versions.
        gate: Calls wait for it; cleared, they wait until it is set or they are cancelled.
        ready: What `status` says.
        versions: What `status` says that it serves; `...` for its own version.
        cancelled: Calls that were given up while they waited.
        replicas: Rows that `stats` gives.
    """

    def __init__(self, name: str = "ray_serve", *, version: str = "1") -> None:
        self.name = name
        self.version = version
        self.calls: list[Call] = []
        self.error: Exception | None = None
        self.errors: dict[str | None, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.ready = True
        self.versions: frozenset[str] | EllipsisType | None = ...
        self.cancelled = 0
        self.replicas: list[dict[str, Any]] = []
        self.running = False

    async def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False

    async def predict(self, call: Call) -> Answer:
        self.calls.append(call)
        if not self.ready:
            raise NotReady("told to be not ready")
        if not self.gate.is_set():
            await self._wait()
        if error := self.error or self.errors.get(call.version):
            raise error
        prediction = fake_prediction(len(call.windows), call.options, version=call.version or self.version)
        stages_ms = {"queue": 0.0, "transport": 0.0, "batch": 0.0, "model": 0.0}
        return Answer(prediction, stages_ms, ((len(call.windows), len(call.windows)),))

    def is_ready(self, version: str | None = None) -> bool:
        return self.ready

    def status(self) -> BackendStatus:
        if not self.ready:
            return BackendStatus(False, "not-ready", versions=None)
        served = frozenset({self.version}) if isinstance(self.versions, EllipsisType) else self.versions
        return BackendStatus(True, versions=served)

    async def stats(self) -> dict[str, Any]:
        return {"calls": len(self.calls), "replicas": self.replicas}

    async def _wait(self) -> None:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
