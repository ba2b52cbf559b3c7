"""The design document's Ray Serve deployment as written, mended only where it cannot run; each mend says why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve

from benchmarks.peers.served import ServedModel
from serve_app.contract import FloatArray, Options


# Mended: `num_replicas` beside `autoscaling_config` is refused by Serve; one replica, as every peer has one worker.
# Mended: 2 CPUs and a runtime_env of its own need a larger machine and a network; the environment is the driver's.
# Mended: the document's names are those of Ray up to 2.9, where a replica took 100 requests at a time. Since Ray 2.32
# (its pull request 45943) it takes 5: no batch of 32 could form, and callers would poll for a place at the replica.
@serve.deployment(
    name="cnn_lstm_predictor", num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 1}
)
class CNNLSTMPredictor:
    def __init__(self, registry: str, model: str, engine: str) -> None:
        # Mended: the default model was never loaded; the engine is the one that every peer serves.
        self.engine = ServedModel(Path(registry), model, engine).load()
        self.request_count = 0
        self.total_processing_time = 0.0

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def batch_predict(self, requests: list[FloatArray]) -> list[dict[str, Any]]:
        start_time = time.time()
        # Mended: np.stack of what `_validate_input` lets through has four axes, and the model takes three.
        prediction = self.engine.predict(np.concatenate(requests), Options(return_features=True))
        results = []
        stop = 0
        for request in requests:
            start, stop = stop, stop + len(request)
            rows = prediction.rows(start, stop)
            weights = rows.ensemble_weights
            # Mended: the gateway reads `predictions` and `uncertainty`, and JSON takes no numpy arrays.
            results.append(
                {
                    "predictions": {
                        "classification_probs": rows.classification_probs.tolist(),
                        "regression_pred": rows.regression_pred.tolist(),
                        "ensemble_weights": None if weights is None else weights.tolist(),
                    },
                    "uncertainty": {"regression_uncertainty": rows.regression_uncertainty.tolist()},
                    "processing_time_ms": (time.time() - start_time) * 1000 / len(prediction),
                }
            )
        self.request_count += len(requests)
        self.total_processing_time += (time.time() - start_time) * 1000
        return results

    async def __call__(self, request_data: FloatArray) -> dict[str, Any]:
        self._validate_input(request_data)
        # Mended: a batched method takes one item and returns that item's result, neither in a list.
        return await self.batch_predict(request_data)

    def _validate_input(self, data: FloatArray) -> None:
        if not isinstance(data, np.ndarray):
            raise ValueError("Input data must be a numpy array")
        if data.ndim != 3:
            raise ValueError(f"Expected 3D input array, got {data.ndim}D")

    def get_stats(self) -> dict[str, Any]:
        average = self.total_processing_time / self.request_count if self.request_count > 0 else 0
        return {"request_count": self.request_count, "avg_processing_time_ms": average}
