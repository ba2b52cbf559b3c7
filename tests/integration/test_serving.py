"""The main job on real parts: a gateway process, its bridge, Ray Serve replicas, the shipped model and bars."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from app.local_ray import LocalRay
from serve_app.bars import load_bars
from serve_app.contract import Options
from serve_app.engine import load_engine
from serve_app.features import latest_window
from serve_app.registry import Registry
from serve_app.serve_config import ServedApplication, ServedModel
from tests.integration.processes import ROOT, GatewayProcess, deploy, replica_pids, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

StartGateway = Callable[..., GatewayProcess]


def ray_environment(cluster: LocalRay) -> dict[str, str]:
    return {**cluster.environment, "RAY_ADDRESS": cluster.address}


def served_model() -> ServedModel:
    return ServedModel(registry_path=str(ROOT / "models"))


def msft() -> np.ndarray:
    return latest_window(load_bars("MSFT").ohlcv)


@pytest.fixture(scope="module")
def deployed(ray_cluster: LocalRay) -> LocalRay:
    deploy(ray_cluster, ServedApplication(serves=served_model()))
    return ray_cluster


@pytest.fixture(scope="module")
def gateway(deployed: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Who changes the share leaves all of it to Ray Serve."""
    gateway = GatewayProcess(tmp_path_factory.mktemp("gateway"), ray_environment(deployed))
    try:
        gateway.wait_for("ray_serve")
        gateway.wait_for("legacy")
        yield gateway
    finally:
        gateway.stop()


def test_both_arms_give_the_engines_own_answer(gateway: GatewayProcess) -> None:
    engine = load_engine(Registry(ROOT / "models").load("cnn_lstm"))
    expected = engine.predict(msft()[np.newaxis], Options())
    with gateway.client() as client:
        for fraction, arm in ((0.0, "legacy"), (1.0, "ray_serve")):
            assert client.put("/rollout", json={"ray_serve_fraction": fraction}).status_code == 200
            as_json = client.post("/ray-serve/predict", json={"data": msft().tolist()})
            raw = {"Content-Type": "application/octet-stream"}
            as_bytes = client.post("/ray-serve/predict", content=msft().tobytes(), headers=raw)
            for response in (as_json, as_bytes):
                assert response.status_code == 200, response.text
                assert response.headers["X-Served-By"] == arm
                assert "X-Fallback" not in response.headers
                body = response.json()
                assert body["backend"] == arm
                np.testing.assert_allclose(
                    body["predictions"]["classification_probs"], expected.classification_probs, atol=1e-5
                )
                np.testing.assert_allclose(
                    body["uncertainty"]["regression_uncertainty"], expected.regression_uncertainty, atol=1e-5
                )


def test_a_batch_larger_than_a_group_comes_back_in_order(gateway: GatewayProcess) -> None:
    windows = np.random.default_rng(7).normal(size=(70, 50, 60)).astype(np.float32)
    expected = load_engine(Registry(ROOT / "models").load("cnn_lstm")).predict(windows, Options())
    with gateway.client() as client:
        raw = {"Content-Type": "application/octet-stream"}
        response = client.post("/ray-serve/predict", content=windows.tobytes(), headers=raw)
    assert response.headers["X-Served-By"] == "ray_serve"
    np.testing.assert_allclose(response.json()["predictions"]["regression_pred"], expected.regression_pred, atol=1e-5)


def test_the_gateway_takes_ray_in_when_it_appears_and_goes_on_without_it_when_it_has_gone(
    start_gateway: StartGateway,
) -> None:
    cluster = LocalRay(num_cpus=4)  # its address is known, and nobody listens there yet
    try:
        gateway = start_gateway(**ray_environment(cluster))
        gateway.wait_for("legacy")
        raw = {"Content-Type": "application/octet-stream"}
        with gateway.client() as client:
            before = client.post("/ray-serve/predict", content=msft().tobytes(), headers=raw)
            assert (before.status_code, before.headers["X-Served-By"]) == (200, "legacy")
            assert before.headers["X-Fallback"] == "not-ready"

            cluster.start()
            deploy(cluster, ServedApplication(serves=served_model()))
            running_at = time.monotonic()

            def arm() -> str:
                response = client.post("/ray-serve/predict", content=msft().tobytes(), headers=raw)
                assert response.status_code == 200, response.text
                return str(response.headers["X-Served-By"])

            wait_until(lambda: arm() == "ray_serve", 30, "Ray Serve to be taken in")
            taken_in_s = time.monotonic() - running_at
            print(f"ray_serve answered {taken_in_s:.1f} s after RUNNING")
            assert taken_in_s < 10

            cluster.stop()
            wait_until(lambda: arm() == "legacy", 15, "legacy to take over")
            wait_until(lambda: gateway.arm_status("ray_serve") not in ("healthy", "degraded"), 15, "that to be noticed")
        assert gateway.is_alive()
    finally:
        cluster.stop()


async def test_nothing_is_lost_when_a_replica_is_killed(deployed: LocalRay, gateway: GatewayProcess) -> None:
    answers: list[httpx.Response] = []
    headers = {**gateway.headers(), "Content-Type": "application/octet-stream"}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=10.0, trust_env=False) as client:

        async def ask() -> None:
            answers.append(await client.post("/ray-serve/predict", content=msft().tobytes()))

        async with asyncio.TaskGroup() as requests:
            for number in range(200):  # 10 seconds at 20 requests a second
                if number == 40:
                    os.kill((await asyncio.to_thread(replica_pids, deployed))[0], signal.SIGKILL)
                requests.create_task(ask())
                await asyncio.sleep(0.05)
    assert len(answers) == 200
    assert {response.status_code for response in answers} == {200}

    def arm() -> str:
        with gateway.client() as client:
            return str(
                client.post("/ray-serve/predict", content=msft().tobytes(), headers=headers).headers["X-Served-By"]
            )

    await asyncio.to_thread(wait_until, lambda: arm() == "ray_serve", 60, "the next replica to answer")


def test_stats_reach_every_replica(deployed: LocalRay, gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        stats: dict[str, Any] = client.get("/ray-serve/stats").json()
        assert len(stats["replicas"]) == len(replica_pids(deployed))
        assert client.get("/health").json()["status"] in ("healthy", "degraded")
        assert "cnn_lstm_replicas_total 1.0" in client.get("/metrics").text
