"""The guarded arm `ray_serve` on the real deployment: replicas end, hang and are replaced under a steady load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.backends.base import Call
from app.backends.breaker import Guarded
from app.backends.probe import Prober
from app.backends.ray_serve import RayServeBackend
from app.local_ray import LocalRay
from app.serve_api import ServeApi
from serve_app.contract import Options, ServingError
from serve_app.serve_config import QueueLimits, ServedApplication, ServedModel, build_config
from tests.integration.processes import replica_pids

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

APP = "breaker_test"
WINDOW = np.zeros((1, 50, 60), np.float32)


class Model:
    """Two replicas of the faulty engine, the file that tells them what to do, and what an operator does to them."""

    def __init__(self, ray: LocalRay, folder: Path) -> None:
        self.ray = ray
        self._file = folder / "fault.json"
        self.tell()

    def tell(self, **fault: Any) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"ms": 5, **fault}))
        new.rename(self._file)

    def deploy(self, **limits: Any) -> None:
        serves = ServedModel(engine="faulty", fault_file=str(self._file))
        config = build_config(ServedApplication(name=APP, serves=serves, queue=QueueLimits(**limits)))
        config["applications"][0]["deployments"][0]["autoscaling_config"].update(min_replicas=2, max_replicas=2)
        with self._api() as api:
            api.put(config)
            time.sleep(1)  # Serve takes a moment to take note
            api.wait_running(APP, timeout_s=120, on_progress=print, clock=time.monotonic)

    def pids(self) -> list[int]:
        return replica_pids(self.ray, APP)

    def kill(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _api(self) -> ServeApi:
        return ServeApi(self.ray.dashboard_url, token=self.ray.token_file.read_text())


@pytest.fixture(scope="module")
def deployed(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = Model(ray_cluster, tmp_path_factory.mktemp("faults"))
    model.deploy()
    return model


@pytest.fixture
async def model(deployed: Model) -> Model:
    deployed.tell()
    await until(lambda: len(deployed.pids()) == 2, 60)
    return deployed


async def until(condition: Callable[[], bool], limit_s: float) -> float:
    started = time.monotonic()
    async with asyncio.timeout(limit_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)
    return time.monotonic() - started


@dataclass
class Load:
    """Calls at fixed times, whatever becomes of the ones before.

    Attributes:
        outcomes: For each call when it was sent, what became of it, and how long that took, in seconds.
    """

    arm: Guarded
    per_s: float = 20.0
    outcomes: list[tuple[float, str, float]] = field(default_factory=list)
    _calls: list[asyncio.Future[None]] = field(default_factory=list)

    @asynccontextmanager
    async def offered(self) -> AsyncIterator[None]:
        sending = asyncio.ensure_future(self._send())
        try:
            yield
        finally:
            sending.cancel()
            await asyncio.gather(*self._calls)

    @property
    def counts(self) -> Counter[str]:
        return Counter(code for _, code, _ in self.outcomes)

    async def _send(self) -> None:
        started, sent = time.monotonic(), 0
        while True:
            self._calls.append(asyncio.ensure_future(self._ask()))
            sent += 1
            await asyncio.sleep(started + sent / self.per_s - time.monotonic())

    async def _ask(self) -> None:
        at, code = time.monotonic(), "ok"
        try:
            await self.arm.predict(Call(WINDOW, Options(), at + 2.0, "r", "0" * 16))
        except ServingError as error:
            code = error.code
        self.outcomes.append((at, code, time.monotonic() - at))


@pytest.fixture
async def arm(model: Model) -> AsyncIterator[Guarded]:
    arm = Guarded(RayServeBackend(model.ray.address, app_name=APP, environment=model.ray.environment))
    prober = Prober([arm])
    await arm.start()
    await prober.start()
    try:
        await until(lambda: arm.status().ready, 30)
        yield arm
    finally:
        await prober.stop()
        await arm.stop()


async def test_with_all_replicas_gone_calls_are_soon_refused_at_once_and_answered_again_by_themselves(
    model: Model, arm: Guarded
) -> None:
    load = Load(arm)
    async with load.offered():
        await asyncio.sleep(0.5)
        model.kill(*model.pids())
        await until(lambda: not arm.status().ready, 5)
        since = time.monotonic()
        await asyncio.sleep(0.5)
        refused = sorted(took for at, code, took in load.outcomes if at > since)
        assert refused[len(refused) // 2] < 0.02
        assert {code for at, code, _ in load.outcomes if at > since} == {"not-ready"}
        await until(lambda: len(model.pids()) > 0, 60)
        assert await until(lambda: arm.status().ready, 10) < 5
        since = time.monotonic()
        await asyncio.sleep(1.5)
    assert {code for at, code, _ in load.outcomes if at > since} == {"ok"}
    assert set(load.counts) <= {"ok", "not-ready", "replica-lost", "unavailable", "deadline-exceeded"}


async def test_a_redeploy_that_replaces_both_replicas_refuses_nobody(model: Model, arm: Guarded) -> None:
    before = set(model.pids())
    load = Load(arm)
    async with load.offered():
        await asyncio.to_thread(model.deploy, stall_s=6.0)
        await until(lambda: len(set(model.pids()) - before) == 2, 60)
    assert load.counts.keys() == {"ok"}, load.counts


async def test_a_replica_that_runs_out_of_memory_again_and_again_is_replaced(model: Model, arm: Guarded) -> None:
    before = set(model.pids())
    model.tell(behaviour="oom")
    load = Load(arm)
    async with load.offered():
        await until(lambda: bool(before - set(model.pids())), 40)
    assert set(load.counts) <= {"ok", "out-of-memory", "not-ready", "replica-lost", "deadline-exceeded", "unavailable"}
    assert load.counts["out-of-memory"]
    model.tell()
    await until(lambda: len(set(model.pids()) - before) == 2, 60)


@pytest.mark.slow
async def test_nothing_is_lost_while_a_replica_is_killed_every_five_seconds_for_a_minute(
    model: Model, arm: Guarded
) -> None:
    load = Load(arm, per_s=50)
    kills = 0
    async with load.offered():
        started = time.monotonic()
        while time.monotonic() - started < 60:
            await until(lambda: len(model.pids()) == 2, 30)
            model.kill(model.pids()[kills % 2])
            kills += 1
            await asyncio.sleep(max(0.0, 5 * kills - (time.monotonic() - started)))
    print(f"{kills} kills, {load.counts}, retries {(await arm.stats())['retries']}")
    assert load.counts.keys() == {"ok"}
    assert kills >= 5
