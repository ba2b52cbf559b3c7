"""Answers whose bits do not depend on batch mates."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from serve_app.contract import N_FEATURES, N_STEPS, FloatArray, Options, Prediction
from serve_app.engine.base import Engine


class ExactEngine:
    """Another engine, asked for one window at a time, always from the same memory.

    Libraries choose kernels, and with them the order in which they add, by the shape of a batch and at times by the
    place of a row in it. A batch of one has one shape and one place, so a window's answer is the same in whatever
    company it comes; the masks of the weight samples are fixed in the artefact. Bits still depend on the kind of cpu,
    the library's version, and the number of threads.

    The price stands in `docs/adr/0004-engines.md`: nothing for one window, a factor for large batches.

    Args:
        engine: What answers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._window = np.empty((1, N_FEATURES, N_STEPS), np.float32)
        self.name = engine.name
        self.device = engine.device
        self.model_name = engine.model_name
        self.model_version = engine.model_version
        self.n_params = engine.n_params
        self.remark = f"{engine.remark}; exact".removeprefix("; ")

    def warm_up(self) -> None:
        self._engine.warm_up()

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        started = time.perf_counter()
        answers = [self._predict_one(window, options) for window in windows]
        return replace(Prediction.join(answers), model_time_ms=(time.perf_counter() - started) * 1000)

    def _predict_one(self, window: FloatArray, options: Options) -> Prediction:
        self._window[0] = window
        return self._engine.predict(self._window, options)
