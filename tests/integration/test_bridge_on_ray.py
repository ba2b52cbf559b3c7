"""The backend `ray_serve` on a real Ray: same answers, and no call lost whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.backends.base import Answer, Call
from app.backends.ray_serve import RayServeBackend
from app.local_ray import LocalRay
from app.serve_api import ServeApi
from serve_app.contract import (
    DeadlineExceeded,
    ModelFailed,
    NotReady,
    Options,
    Prediction,
    ReplicaLost,
    ServingError,
    as_windows,
)

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
APP = "echo"
OTHER, BARE = Options(return_features=True), Options(return_uncertainty=False)  # who asks for these has a group apart


def deploy(ray: LocalRay, app: str, *, replicas: int = 1) -> None:
    application = {
        "name": app,
        "route_prefix": None,
        "import_path": "tests.integration.tiny_app:build",
        "args": {"replicas": replicas},
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
    }
    with ServeApi(ray.dashboard_url, token=ray.token_file.read_text()) as api:
        api.put({"proxy_location": "Disabled", "applications": [application]})
        api.wait_running(app, timeout_s=60, on_progress=lambda _: None, clock=time.monotonic)


@pytest.fixture(scope="module")
def echo(ray_cluster: LocalRay) -> LocalRay:
    """The cluster with the tiny application on two replicas."""
    deploy(ray_cluster, APP, replicas=2)
    return ray_cluster


@asynccontextmanager
async def backend_on(ray: LocalRay) -> AsyncIterator[RayServeBackend]:
    backend = RayServeBackend(ray.address, app_name=APP, environment=ray.environment)
    await backend.start()
    try:
        await until(lambda: backend.status().ready, 30)
        yield backend
    finally:
        await backend.stop()


async def until(condition: Callable[[], bool], limit_s: float) -> float:
    """Wait for the condition and return the seconds it took."""
    started = time.monotonic()
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)
    return time.monotonic() - started


def call(*marks: float, timeout_s: float = 5.0, version: str | None = None, has_fallback: bool = False) -> Call:
    windows = np.zeros((len(marks), 50, 60), np.float32)
    windows[:, 0, 0] = marks
    deadline = time.monotonic() + timeout_s
    return Call(as_windows(windows), Options(), deadline, "r", "0" * 16, version, has_fallback=has_fallback)


async def replica_pids(backend: RayServeBackend) -> list[int]:
    return [row["pid"] for row in (await backend.stats())["replicas"]]


async def offer(backend: RayServeBackend, rate: float, seconds: float) -> list[Answer | BaseException]:
    """Send calls at fixed times, whatever becomes of the ones before, and gather what came back for each."""
    calls = []
    for index in range(int(rate * seconds)):
        calls.append(asyncio.ensure_future(backend.predict(call(index + 1))))
        await asyncio.sleep(1 / rate)
    return await asyncio.gather(*calls, return_exceptions=True)


def marks(prediction: Prediction) -> list[float]:
    return prediction.regression_pred.tolist()


async def test_answers_come_back_for_the_very_windows_that_were_sent(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        sent = [tuple(range(10 * i, 10 * i + 1 + i)) for i in range(8)] + [tuple(range(100))]
        answers = await asyncio.gather(*(backend.predict(call(*each)) for each in sent))
        assert [marks(answer.prediction) for answer in answers] == [list(each) for each in sent]
        assert all(answer.stages_ms.keys() == {"queue", "transport", "batch", "model"} for answer in answers)


async def test_the_models_error_arrives_as_itself_and_the_next_call_is_answered(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        with pytest.raises(ModelFailed, match="the forward pass raised"):
            await backend.predict(call(-1))
        assert marks((await backend.predict(call(3))).prediction) == [3]


async def test_a_call_that_hangs_is_given_up_at_its_deadline(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await backend.predict(call(-2, timeout_s=0.3))
        assert time.monotonic() - started < 0.35 + 0.2  # the machine is busy
        assert marks((await backend.predict(call(3))).prediction) == [3]


async def test_a_version_that_is_not_deployed_is_refused_at_once(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        with pytest.raises(NotReady):
            await backend.predict(call(1, version="99"))


async def test_a_candidate_version_is_served_by_its_own_application(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        deploy(echo, f"{APP}-7")
        await until(lambda: backend.status().detail["apps"].get(f"{APP}-7", {}).get("ready", False), 10)
        assert marks((await backend.predict(call(5, version="7"))).prediction) == [5]
        served = {row["app"]: row["window_count"] for row in (await backend.stats())["replicas"]}
        assert served[f"{APP}-7"] == 1


async def test_stats_have_a_row_per_replica_and_totals(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        before = (await backend.stats())["totals"]["window_count"]
        await asyncio.gather(*(backend.predict(call(*range(1, 4))) for _ in range(10)))
        stats = await backend.stats()
        assert len([row for row in stats["replicas"] if row["app"] == APP]) == 2
        assert stats["totals"]["window_count"] - before == 30
        assert stats["missing"] == {}


async def test_no_call_is_lost_when_a_replica_is_killed_under_load(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        load = asyncio.ensure_future(offer(backend, rate=50, seconds=10))
        for _ in range(2):
            os.kill((await replica_pids(backend))[0], signal.SIGKILL)
            await asyncio.sleep(5)
        answers = await load
        assert [a for a in answers if isinstance(a, BaseException)] == []
        assert [marks(a.prediction) for a in answers] == [[i + 1] for i in range(len(answers))]
        await until(lambda: backend.status().detail["apps"][APP]["replicas"] == 2, 20)


async def test_with_all_replicas_dead_calls_fail_fast_and_come_back_by_themselves(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        for pid in await replica_pids(backend):
            os.kill(pid, signal.SIGKILL)
        answers = await offer(backend, rate=20, seconds=2)
        assert all(isinstance(a, Answer | ServingError) for a in answers)
        await until(lambda: backend.status().ready, 30)
        assert marks((await backend.predict(call(2))).prediction) == [2]
        assert backend.status().detail["starts"] == 1
        await until(lambda: backend.status().detail["apps"][APP]["replicas"] == 2, 20)


async def test_a_killed_bridge_is_replaced_and_who_has_time_and_nobody_else_is_answered_through_the_next(
    echo: LocalRay,
) -> None:
    async with backend_on(echo) as backend:
        patient = asyncio.ensure_future(backend.predict(call(-3, timeout_s=30.0)))
        hasty = asyncio.ensure_future(backend.predict(replace(call(-3, timeout_s=1.0), options=OTHER)))
        others = asyncio.ensure_future(backend.predict(replace(call(-3, has_fallback=True), options=BARE)))
        await asyncio.sleep(0.2)
        os.kill(backend.status().detail["pid"], signal.SIGKILL)
        for open_call in (hasty, others):
            with pytest.raises(ReplicaLost):
                await asyncio.wait_for(open_call, 0.5)
        with pytest.raises(NotReady):
            await backend.predict(call(1))
        assert marks((await patient).prediction) == [-3]
        assert backend.status().detail["starts"] == 2
        assert (await backend.stats())["retries"] == {"made": 1, "over_budget": 0}


async def test_a_stopped_bridge_is_replaced(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        os.kill(backend.status().detail["pid"], signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            await backend.predict(call(1, timeout_s=0.2))
        await until(lambda: not backend.status().ready, 10)
        await until(lambda: backend.status().ready, 30)
        assert marks((await backend.predict(call(2))).prediction) == [2]


async def test_stopping_leaves_no_bridge_behind(echo: LocalRay) -> None:
    async with backend_on(echo) as backend:
        pid = backend.status().detail["pid"]
    assert not Path(f"/proc/{pid}").exists()


async def serve_from(cluster: LocalRay, backend: RayServeBackend) -> None:
    """Start the cluster, see it taken in, end it, see that noticed."""
    try:
        await asyncio.to_thread(cluster.start)
        await asyncio.to_thread(deploy, cluster, APP)
        assert await until(lambda: backend.status().ready, 20) < 10
        assert marks((await backend.predict(call(2))).prediction) == [2]
    finally:
        await asyncio.to_thread(cluster.stop)
    await until(lambda: not backend.status().ready, 15)


async def test_without_a_cluster_calls_fail_at_once() -> None:
    """That one that appears is taken in is tried through a gateway, in `test_serving.py`."""
    cluster = LocalRay(num_cpus=2)  # never started
    backend = RayServeBackend(cluster.address, app_name=APP, environment=cluster.environment)
    try:
        await backend.start()
        await until(lambda: backend.status().reason == "no-cluster", 20)
        with pytest.raises(NotReady, match="no Ray cluster"):
            await backend.predict(call(1))
    finally:
        await backend.stop()
        cluster.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)  # two clusters start and end in it
async def test_a_cluster_that_replaces_another_is_taken_in(tmp_path: Path) -> None:
    first, second = LocalRay(num_cpus=2), LocalRay(num_cpus=2)
    token_file = tmp_path / "auth_token"
    token_file.write_text(first.token_file.read_text())
    second.token_file.write_text(first.token_file.read_text())
    second._ports = first._ports  # another cluster at the same address, as after the loss of a head
    environment = first.environment | {"RAY_AUTH_TOKEN_PATH": str(token_file)}
    backend = RayServeBackend(first.address, app_name=APP, environment=environment)
    await backend.start()
    await serve_from(first, backend)
    await serve_from(second, backend)
    await backend.stop()
