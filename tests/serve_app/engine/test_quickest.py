"""Which engine `auto` keeps, with engines whose times are made up."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import pytest

from serve_app.contract import FloatArray, Options, Prediction
from serve_app.engine.base import Setup
from serve_app.engine.quickest import load_quickest
from serve_app.engine.stubs import NoopEngine
from tests.serve_app.engine.made import shipped


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Timed(NoopEngine):
    """Takes as long as it is told to, by batch size; the first passes take a second."""

    clock: Clock
    ms: dict[int, float]
    name: str = "timed"
    remark: str = ""
    model_version: str = "1"
    passes: dict[int, int] = field(default_factory=dict)

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        size = len(windows)
        self.passes[size] = self.passes.get(size, 0) + 1
        self.clock.now += 1.0 if self.passes[size] <= 2 else self.ms[size] / 1000
        return super().predict(windows, options)


def chosen(clock: Clock, setup: Setup = Setup(), /, **ms: dict[int, float]) -> Timed:  # noqa: B008  # frozen
    engines = {name: Timed(clock, times, name=name) for name, times in ms.items()}
    loaders = {name: (lambda artefact, setup, engine=engine: engine) for name, engine in engines.items()}
    engine = load_quickest(loaders, shipped(), setup, clock)
    assert isinstance(engine, Timed)
    return engine


def test_the_least_geometric_mean_wins_and_first_passes_do_not_count() -> None:
    # b is half as slow at one window and a fifth slower at 32.
    engine = chosen(Clock(), a={1: 1.0, 32: 10.0}, b={1: 0.5, 32: 12.0}, c={1: 0.7, 32: 12.0})
    assert engine.name == "b"


def test_for_the_exact_mode_large_batches_do_not_count_because_it_runs_none() -> None:
    engine = chosen(Clock(), Setup(exact=True), a={1: 1.0, 32: 8.0}, b={1: 0.8, 32: 32.0})
    assert engine.name == "b"
    assert engine.remark == "auto, ms per window at batches of 1: a 1.000, b 0.800"


def test_what_was_chosen_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serve_app.engine.quickest"):
        engine = chosen(Clock(), a={1: 1.0, 32: 16.0}, b={1: 0.5, 32: 8.0})
    assert engine.remark == "auto, ms per window at batches of 1 and 32: a 1.000 and 0.500, b 0.500 and 0.250"
    assert "engine b chosen" in caplog.text
    assert engine.remark in caplog.text


def test_an_engine_that_answers_something_else_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Timed):
        def predict(self, windows: FloatArray, options: Options) -> Prediction:
            answer = super().predict(windows, options)
            answer.regression_pred[:] = np.float32(0.001)
            return answer

    clock = Clock()
    right, wrong = Timed(clock, {1: 1.0, 32: 10.0}, name="right"), Wrong(clock, {1: 0.1, 32: 1.0}, name="wrong")
    loaders = {"right": lambda artefact, setup: right, "wrong": lambda artefact, setup: wrong}
    assert load_quickest(loaders, shipped(), Setup(), clock) is right
    assert "wrong answers otherwise than right" in caplog.text


def test_an_engine_that_cannot_be_loaded_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fails(artefact: object, setup: object) -> Timed:
        raise RuntimeError("no such operation")

    clock = Clock()
    right = Timed(clock, {1: 1.0, 32: 10.0}, name="right")
    loaders = {"right": lambda artefact, setup: right, "broken": fails}
    assert load_quickest(loaders, shipped(), Setup(), clock) is right
    assert "broken cannot be loaded" in caplog.text


def test_an_engine_that_loads_and_cannot_run_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Timed):
        def predict(self, windows: FloatArray, options: Options) -> Prediction:
            raise RuntimeError("no such kernel on this processor")

    clock = Clock()
    right, raising = Timed(clock, {1: 1.0, 32: 10.0}, name="right"), Raising(clock, {}, name="raising")
    loaders = {"right": lambda artefact, setup: right, "raising": lambda artefact, setup: raising}
    assert load_quickest(loaders, shipped(), Setup(), clock) is right
    assert "raising cannot be loaded" in caplog.text
