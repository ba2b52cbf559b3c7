"""A Serve application with the methods that the bridge calls and no model behind them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
from ray import serve

from serve_app.contract import N_FEATURES, N_STEPS, ModelFailed, Prediction


@serve.deployment(max_ongoing_requests=512, health_check_period_s=1.0, health_check_timeout_s=3.0)
class Echo:
    """Answers with each window's first value as the regression; -1 fails, -2 takes forever, -3 half a second."""

    def __init__(self) -> None:
        self._served = 0

    async def predict_packed(
        self, windows: bytes, options: tuple[bool, bool, bool], budget_s: float, n_requests: int = 1
    ) -> bytes:
        marks = np.frombuffer(windows, "<f4").reshape(-1, N_FEATURES, N_STEPS)[:, 0, 0].copy()
        if (marks == -1).any():
            raise ModelFailed("the forward pass raised")
        if (marks == -2).any():
            await asyncio.sleep(60)
        if (marks == -3).any():
            await asyncio.sleep(0.5)
        self._served += len(marks)
        third = np.full((len(marks), 3), 1 / 3, np.float32)
        one = np.ones(len(marks), np.float32)
        return Prediction(third, marks, one, one, one, one, third, None, "echo", "1", 0.0, 0.0).pack()

    async def get_stats(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "window_count": self._served}


def build(arguments: dict[str, Any]) -> serve.Application:
    return Echo.options(num_replicas=arguments.get("replicas", 1), ray_actor_options={"num_cpus": 0.1}).bind()
