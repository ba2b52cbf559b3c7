"""The promise of the exact mode: a window's bits are its own, whatever company it comes in."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from serve_app.batching import DrainQueue
from serve_app.contract import FloatArray, Prediction
from serve_app.engine import Engine
from serve_app.engine.base import EVERYTHING
from serve_app.engine.exact import ExactEngine
from tests.serve_app.engine.made import loaded, real_windows

ENGINES = ("torch", "onnxruntime", "openvino")


def exact(name: str) -> Engine:
    engine = ExactEngine(loaded(name))
    engine.warm_up()  # a trace is optimised during its first passes, and its bits with it
    return engine


def bits(prediction: Prediction, row: int) -> dict[str, bytes]:
    return {name: array[row].tobytes() for name, array in prediction._arrays()}


def mates(seed: int, window: FloatArray, position: int) -> FloatArray:
    """A batch of 32 with the window at a position, among real windows in some order and noise."""
    random = np.random.default_rng(seed)
    batch = random.permutation(real_windows())
    batch[random.random(32) < 0.5] += random.standard_normal(batch.shape[1:], dtype=np.float32)
    batch[position] = window
    return batch


@pytest.mark.parametrize("name", ENGINES)
def test_a_window_answers_the_same_bits_alone_and_at_every_place_of_a_batch(name: str) -> None:
    window = real_windows()[11]
    engine = exact(name)
    alone = bits(engine.predict(window[np.newaxis], EVERYTHING), 0)
    for position in range(32):
        together = engine.predict(mates(position, window, position), EVERYTHING)
        assert bits(together, position) == alone


def test_without_it_the_bits_do_depend_on_the_batch() -> None:
    # Or the mode would promise what is had for nothing.
    engine = loaded("torch")
    windows = real_windows()
    together = engine.predict(windows, EVERYTHING)
    assert any(
        bits(engine.predict(windows[row : row + 1], EVERYTHING), 0) != bits(together, row)
        for row in range(len(windows))
    )


@pytest.mark.parametrize("name", ENGINES)
async def test_it_holds_through_the_replicas_queue(name: str) -> None:
    windows = real_windows()
    engine = exact(name)
    alone = [bits(engine.predict(window[np.newaxis], EVERYTHING), 0) for window in windows]
    queue = DrainQueue(max_batch_windows=32, max_queue_windows=512, inline_windows=4)
    deadline = asyncio.get_running_loop().time() + 60
    sizes = (1, 3, 2, 8, 1, 5, 12)
    starts = np.cumsum((0, *sizes))
    answers = await asyncio.gather(
        *(
            queue.predict(engine, windows[start : start + size], EVERYTHING, deadline=deadline)
            for start, size in zip(starts, sizes, strict=False)
        )
    )
    queue.close()
    assert [bits(answer, row) for answer in answers for row in range(len(answer))] == alone
