"""The legacy arm: loads beside the event loop, batches what waits, tells plainly why it is not ready."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.backends.base import Call
from app.backends.in_process import InProcessBackend, LoadFailed, RegistrySource
from serve_app.contract import FloatArray, ModelFailed, ModelNotFound, NotReady, Options, Prediction
from serve_app.engine.weights import load_model
from tests.app.under_test import FakeClock

from .hand_driven import prediction_for, windows

MINUTE = 60.0


class GatedEngine:
    """Answers each window with its mark; a forward pass waits for the gate."""

    name = "gated"
    device = "cpu"
    model_name = "echo"
    n_params = 0
    remark = ""

    def __init__(self, version: str = "3") -> None:
        self.model_version = version
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []

    def warm_up(self) -> None:
        pass

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        assert self.gate.wait(10)
        self.batches.append(len(windows))
        if windows[0, 0, 0] < 0:
            raise RuntimeError("secret shape")
        return prediction_for(windows[:, 0, 0].copy())


class Shelf:
    """A source whose default version is 3; every other load waits for the gate."""

    def __init__(self, load: Callable[[], GatedEngine] = GatedEngine) -> None:
        self._load = load
        self.gate = threading.Event()
        self.gate.set()
        self.loaded: list[str] = []
        self.engines: dict[str, GatedEngine] = {}
        self.aliases = frozenset({"3"})
        self.watched: list[weakref.ref[GatedEngine]] = []
        self.released: list[tuple[str, int]] = []

    def load(self, version: str | None) -> GatedEngine:
        if version is None:
            return self._load()
        assert self.gate.wait(10)
        self.loaded.append(version)
        if version == "9":
            raise LoadFailed("version-not-found", "no version 9")
        if version == "6":
            raise LoadFailed("artefact-rejected", "damaged")
        self.engines[version] = GatedEngine("7" if version == "stable" else version)
        return self.engines[version]

    def aliased(self) -> frozenset[str]:
        return self.aliases

    def release(self, device: str) -> None:
        self.released.append((device, sum(engine() is not None for engine in self.watched)))


def call(*marks: float, version: str | None = None) -> Call:
    deadline = asyncio.get_running_loop().time() + MINUTE
    return Call(windows(*marks), Options(), deadline, "r", "0" * 16, version)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # what is awaited happens on a thread of the subject
            await asyncio.sleep(0.001)


async def started(load: Callable[[], GatedEngine]) -> InProcessBackend:
    backend = InProcessBackend(Shelf(load))
    await backend.start()
    return backend


async def ready(engine: GatedEngine) -> InProcessBackend:
    backend = await started(lambda: engine)
    await until(lambda: backend.status().ready)
    return backend


async def shelved(shelf: Shelf, **changes: Any) -> InProcessBackend:
    backend = InProcessBackend(shelf, **changes)
    await backend.start()
    await until(lambda: backend.status().ready)
    return backend


async def fetch(backend: InProcessBackend, version: str) -> None:
    """Call until the version is there."""
    with pytest.raises(NotReady):
        await backend.predict(call(1, version=version))
    await until(lambda: version in backend.status().detail["versions_in_memory"])


async def test_it_answers_from_its_engine() -> None:
    engine = GatedEngine()
    backend = await ready(engine)
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


async def test_a_version_not_in_memory_is_loaded_while_its_calls_fail_at_once_and_others_are_answered() -> None:
    shelf = Shelf()
    shelf.gate.clear()
    backend = await shelved(shelf)
    for _ in range(3):
        with pytest.raises(NotReady, match="being loaded"):
            await backend.predict(call(1, version="4"))
    assert (await backend.predict(call(2))).prediction.regression_pred.tolist() == [2]
    assert (await backend.predict(call(2, version="3"))).prediction.regression_pred.tolist() == [2]
    shelf.gate.set()
    await until(lambda: "4" in backend.status().detail["versions_in_memory"])
    await backend.predict(call(5, version="4"))
    assert shelf.engines["4"].batches == [1], "each version has an engine of its own"
    assert shelf.loaded == ["4"], "three calls began one load"
    await backend.stop()


async def test_the_versions_in_memory_are_those_that_are_served() -> None:
    backend = await started(GatedEngine)
    assert backend.status().versions is None
    await until(lambda: backend.status().ready)
    assert backend.status().versions == {"3"}
    await fetch(backend, "4")
    assert backend.status().versions == {"3", "4"}
    await backend.stop()


async def test_a_version_that_cannot_be_had_is_told_and_not_tried_at_every_call() -> None:
    clock = FakeClock(asyncio.get_running_loop().time())
    shelf = Shelf()
    backend = await shelved(shelf, clock=clock)
    for version, kind in (("9", ModelNotFound), ("6", NotReady), ("stable", ModelNotFound)):
        with pytest.raises(NotReady):
            await backend.predict(call(1, version=version))
        await until(lambda version=version: version in shelf.loaded and not backend._loading)
        for _ in range(3):
            with pytest.raises(kind):
                await backend.predict(call(1, version=version))
        assert shelf.loaded.count(version) == 1
    clock.advance(31)
    with pytest.raises(NotReady):
        await backend.predict(call(1, version="9"))
    await until(lambda: shelf.loaded.count("9") == 2)
    await backend.stop()


async def test_the_least_used_version_makes_room_and_is_cleaned_up_after() -> None:
    shelf = Shelf()
    backend = await shelved(shelf, cache_size=3)
    for version in ("4", "5"):
        await fetch(backend, version)
    await backend.predict(call(1, version="4"))
    shelf.watched.append(weakref.ref(shelf.engines.pop("5")))
    await fetch(backend, "8")
    assert backend.status().detail["versions_in_memory"] == ["3", "4", "8"]
    assert shelf.released == [("cpu", 0)], "at the clean-up nothing refers to the engine any more"
    await backend.stop()


async def test_an_idle_version_goes_in_time_and_the_default_and_the_aliased_stay() -> None:
    clock = FakeClock(asyncio.get_running_loop().time())
    shelf = Shelf()
    backend = await shelved(shelf, cache_size=3, cache_ttl_s=60.0, clock=clock)
    for version in ("4", "5"):
        await fetch(backend, version)
    shelf.aliases = frozenset({"5"})
    clock.advance(61)
    await backend.expire()
    assert backend.status().detail["versions_in_memory"] == ["3", "5"]
    await backend.stop()


async def test_without_room_a_version_is_refused_and_the_others_stay() -> None:
    shelf = Shelf()
    backend = await shelved(shelf, cache_size=1)
    with pytest.raises(NotReady):
        await backend.predict(call(1, version="4"))
    await until(lambda: not backend._loading)
    with pytest.raises(NotReady, match="no room"):
        await backend.predict(call(1, version="4"))
    assert (await backend.predict(call(2))).prediction.regression_pred.tolist() == [2]
    assert shelf.loaded == []
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


def source(path: Path, **changes: Any) -> RegistrySource:
    facts = {"model": "cnn_lstm", "version": "latest", "engine": "torch", "device": "cpu", "threads": 1}
    return RegistrySource(path, **{**facts, **changes})


def test_an_empty_registry_is_told_from_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "cnn_lstm").mkdir()
    with pytest.raises(LoadFailed) as caught:
        source(tmp_path).load(None)
    assert caught.value.reason == "version-not-found"


def test_the_noop_engine_needs_no_registry(tmp_path: Path) -> None:
    engine = source(tmp_path / "none", engine="noop").load(None)
    assert len(engine.predict(np.zeros((2, 50, 60), np.float32), Options())) == 2


def test_the_exact_mode_reaches_the_engine() -> None:
    shipped = Path(__file__).parents[3] / "models"
    assert [source(shipped, exact=exact).load(None).remark for exact in (True, False)] == ["exact", ""]


def test_a_load_leaves_no_model_behind_once_its_engine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(__file__).parents[3] / "models"
    models: list[weakref.ref[Any]] = []

    def remembered(*arguments: Any) -> Any:
        model = load_model(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr("serve_app.engine.pytorch.load_model", remembered)
    source(shipped).load(None)
    gc.collect()
    assert [model() for model in models] == [None]


def test_an_engine_that_is_not_installed_is_a_failed_load_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(__file__).parents[3] / "models"
    monkeypatch.setattr("serve_app.extras.find_spec", lambda library: None)
    with pytest.raises(LoadFailed, match=r"pip install 'sluice\[openvino\]'") as caught:
        source(shipped, engine="openvino").load(None)
    assert caught.value.reason == "load-failed"


def test_importing_the_backends_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, app.backends.in_process, app.backends.ray_serve, app.backends.probe; "
        "print({'torch', 'ray'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "set()"
