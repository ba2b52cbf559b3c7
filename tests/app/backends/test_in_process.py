"""The legacy arm: loads beside the event loop, batches what waits, tells plainly why it is not ready."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.backends.base import Call
from app.backends.in_process import InProcessBackend, LoadFailed, load_from_registry
from serve_app.contract import FloatArray, ModelFailed, ModelNotFound, NotReady, Options, Prediction

from .hand_driven import prediction_for, windows

MINUTE = 60.0


class GatedEngine:
    """Answers each window with its mark; a forward pass waits for the gate."""

    name = "gated"
    device = "cpu"
    model_name = "echo"
    model_version = "3"
    n_params = 0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.warm = False

    def warm_up(self) -> None:
        self.warm = True

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        assert self.gate.wait(10)
        self.batches.append(len(windows))
        if windows[0, 0, 0] < 0:
            raise RuntimeError("secret shape")
        return prediction_for(windows[:, 0, 0].copy())


def call(*marks: float, version: str | None = None) -> Call:
    deadline = asyncio.get_running_loop().time() + MINUTE
    return Call(windows(*marks), Options(), deadline, "r", "0" * 16, version)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # what is awaited happens on a thread of the subject
            await asyncio.sleep(0.001)


async def started(load: Callable[[], GatedEngine]) -> InProcessBackend:
    backend = InProcessBackend(load)
    await backend.start()
    return backend


async def ready(engine: GatedEngine) -> InProcessBackend:
    backend = await started(lambda: engine)
    await until(lambda: backend.status().ready)
    return backend


async def test_it_answers_from_a_warm_engine() -> None:
    engine = GatedEngine()
    backend = await ready(engine)
    assert engine.warm
    assert (await backend.predict(call(4, 5))).prediction.regression_pred.tolist() == [4, 5]
    assert backend.status().detail["model_version"] == "3"
    await backend.stop()


async def test_while_it_loads_calls_fail_at_once_and_start_has_returned() -> None:
    gate = threading.Event()

    def load() -> GatedEngine:
        assert gate.wait(10)
        return GatedEngine()

    backend = await started(load)
    assert backend.status().reason == "loading"
    with pytest.raises(NotReady):
        await backend.predict(call(1))
    gate.set()
    await until(lambda: backend.status().ready)
    await backend.stop()


async def test_calls_that_wait_for_a_forward_pass_share_the_next() -> None:
    engine = GatedEngine()
    backend = await ready(engine)
    engine.gate.clear()
    first = asyncio.ensure_future(backend.predict(call(0)))
    await until(lambda: backend._coalescer.stats()["in_flight_groups"] == 1)
    rest = [asyncio.ensure_future(backend.predict(call(mark))) for mark in (1, 2, 3)]
    await asyncio.sleep(0.01)
    engine.gate.set()
    answers = await asyncio.gather(first, *rest)
    assert [float(a.prediction.regression_pred[0]) for a in answers] == [0, 1, 2, 3]
    assert engine.batches == [1, 3]
    await backend.stop()


async def test_a_forward_pass_that_raises_is_model_failed_without_its_words() -> None:
    backend = await ready(GatedEngine())
    with pytest.raises(ModelFailed) as caught:
        await backend.predict(call(-1))
    assert "secret" not in caught.value.detail
    assert (await backend.predict(call(1))).prediction.regression_pred.tolist() == [1]
    await backend.stop()


async def test_another_version_is_not_found() -> None:
    backend = await ready(GatedEngine())
    await backend.predict(call(1, version="3"))
    with pytest.raises(ModelNotFound):
        await backend.predict(call(1, version="4"))
    await backend.stop()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(LoadFailed("version-not-found", "no version 9"), "version-not-found"), (MemoryError("at 0x1"), "load-failed")],
)
async def test_a_failed_load_shows_a_closed_reason(error: Exception, reason: str) -> None:
    def load() -> GatedEngine:
        raise error

    backend = await started(load)
    await until(lambda: backend.status().reason != "loading")
    assert (backend.status().ready, backend.status().reason) == (False, reason)
    await backend.stop()


async def test_a_failed_load_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.backends.in_process.FIRST_BACKOFF_S", 0.01)
    attempts = []

    def load() -> GatedEngine:
        attempts.append(1)
        if len(attempts) < 3:
            raise LoadFailed("load-failed", "the disk is away")
        return GatedEngine()

    backend = await started(load)
    await until(lambda: backend.status().ready)
    assert len(attempts) == 3
    await backend.stop()


async def test_stopping_fails_the_calls_that_wait() -> None:
    engine = GatedEngine()
    backend = await ready(engine)
    engine.gate.clear()
    waiting = asyncio.ensure_future(backend.predict(call(1)))
    await until(lambda: backend._coalescer.stats()["in_flight_groups"] == 1)
    await backend.stop()
    with pytest.raises(NotReady):
        await waiting
    engine.gate.set()


def test_an_empty_registry_is_told_from_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "cnn_lstm").mkdir()
    with pytest.raises(LoadFailed) as caught:
        load_from_registry(tmp_path, model="cnn_lstm", version="latest", engine="torch", device="cpu", threads=1)
    assert caught.value.reason == "version-not-found"


def test_the_noop_engine_needs_no_registry(tmp_path: Path) -> None:
    engine = load_from_registry(
        tmp_path / "none", model="cnn_lstm", version="1", engine="noop", device="cpu", threads=1
    )
    assert len(engine.predict(np.zeros((2, 50, 60), np.float32), Options())) == 2


def test_importing_the_backends_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, app.backends.in_process, app.backends.ray_serve, app.backends.probe; "
        "print({'torch', 'ray'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "set()"
