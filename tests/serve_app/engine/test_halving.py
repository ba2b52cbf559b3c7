"""A batch without memory is halved once; a model that is short again and again is found out."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from app.backends.fake import fake_prediction
from serve_app.contract import FloatArray, Options, OutOfMemory, Prediction
from serve_app.engine.base import Setup
from serve_app.engine.halving import HalvingEngine, Shortages
from serve_app.engine.stubs import NoopEngine


class Full:
    """What a failed pass leaves behind."""


class SmallEngine(NoopEngine):
    """Has memory for so many windows at a time; answers each window's first value."""

    def __init__(self, room: int) -> None:
        super().__init__(None, Setup())
        self.room = room
        self.sizes: list[int] = []
        self.left_behind: list[weakref.ref[Full]] = []
        self.found_behind = 0
        self.error: type[Exception] = torch.OutOfMemoryError

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        self.found_behind += sum(ref() is not None for ref in self.left_behind)
        self.sizes.append(len(windows))
        full = Full()
        self.left_behind.append(weakref.ref(full))
        if len(windows) > self.room:
            raise self.error("no memory")
        prediction = fake_prediction(len(windows), options)
        prediction.regression_pred[:] = windows[:, 0, 0]
        return prediction


def windows(size: int) -> FloatArray:
    batch = np.zeros((size, 50, 60), np.float32)
    batch[:, 0, 0] = np.arange(size)
    return batch


@pytest.mark.parametrize("size", [1, 4])
def test_with_memory_for_it_a_batch_is_run_as_it_is(size: int) -> None:
    engine = SmallEngine(4)
    HalvingEngine(engine).predict(windows(size), Options())
    assert engine.sizes == [size]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("size", [5, 8])
def test_a_batch_without_memory_is_answered_in_halves_and_in_order(size: int, error: type[Exception]) -> None:
    engine = SmallEngine(4)
    engine.error = error
    answer = HalvingEngine(engine).predict(windows(size), Options())
    assert answer.regression_pred.tolist() == list(range(size))
    assert engine.sizes == [size, (size + 1) // 2, size // 2]


def test_what_the_failed_pass_held_is_gone_before_the_next() -> None:
    engine = SmallEngine(4)
    gc.disable()
    try:
        HalvingEngine(engine).predict(windows(8), Options())
    finally:
        gc.enable()
    assert engine.found_behind == 0


@pytest.mark.parametrize(("size", "tried"), [(9, [9, 5]), (1, [1])])
def test_it_is_halved_once_and_a_single_window_not_at_all(size: int, tried: list[int]) -> None:
    engine = SmallEngine(0 if size == 1 else 4)
    with pytest.raises(OutOfMemory):
        HalvingEngine(engine).predict(windows(size), Options())
    assert engine.sizes == tried


def test_another_failure_is_no_want_of_memory() -> None:
    engine = SmallEngine(4)
    engine.error = RuntimeError
    with pytest.raises(RuntimeError):
        HalvingEngine(engine).predict(windows(8), Options())
    assert engine.sizes == [8]


def test_three_batches_given_up_within_a_minute_are_many() -> None:
    now = 100.0
    shortages = Shortages(lambda: now)
    engine = HalvingEngine(SmallEngine(4), shortages)
    for at, many in ((100.0, False), (130.0, False), (159.0, True), (161.0, False), (189.0, True)):
        now = at
        if at != 161.0:
            with pytest.raises(OutOfMemory):
                engine.predict(windows(9), Options())
        assert shortages.are_many is many, at


def test_batches_that_were_answered_in_halves_are_no_reason_to_end() -> None:
    shortages = Shortages(lambda: 100.0)
    for _ in range(10):
        HalvingEngine(SmallEngine(4), shortages).predict(windows(8), Options())
    assert not shortages.are_many


def test_it_is_known_by_what_it_wraps() -> None:
    engine, halving = SmallEngine(4), HalvingEngine(SmallEngine(4))
    for name in ("name", "device", "model_name", "model_version", "n_params", "remark"):
        assert getattr(halving, name) == getattr(engine, name)
