"""The compose file's services, started as processes in the order of their dependencies, serve a prediction."""

from __future__ import annotations

import ssl
import stat

import httpx
import pytest

from app.serve_api import ServeApi
from serve_app.bars import load_bars
from serve_app.contract import APP_NAME
from serve_app.features import latest_window
from tests.docker.edge.process import missing
from tests.integration.composed import Composed
from tests.integration.processes import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_the_services_serve_a_prediction_through_ray() -> None:
    if reason := missing():
        pytest.skip(f"the edge needs nginx with its stream module: {reason}")
    with Composed() as services:
        assert services.completes("deploy") == 0, services.log("deploy")
        for name in ("edge", "ray-head", "ray-worker", "gateway", "gateway-node", "redis"):
            wait_until(lambda name=name: services.is_healthy(name), 60, f"{name} to be healthy")

        token = services.run("gateway", ["sluice", "token", "--sub", "desk", "--scope", "predict ops"]).stdout.strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
        window = latest_window(load_bars("MSFT").ohlcv).tobytes()
        authority = ssl.create_default_context(cafile=str(services.secrets / "edge_ca.crt"))
        with httpx.Client(
            base_url=services.edge_url, headers=headers, timeout=10, trust_env=False, verify=authority
        ) as client:

            def ray_answers() -> bool:
                response = client.post("/ray-serve/predict", content=window)
                return response.status_code == 200 and response.headers["X-Served-By"] == "ray_serve"

            wait_until(ray_answers, 60, "Ray Serve to answer")
            assert client.get("/ray-serve/stats").status_code == 404  # not from outside
        with httpx.Client(base_url=services.gateway_url, headers=headers, timeout=10, trust_env=False) as client:
            assert len(client.get("/ray-serve/stats").json()["replicas"]) == 1
            assert "X-RateLimit-Mode" not in client.post("/ray-serve/predict", content=window).headers  # Redis counts

        secret = services.secrets / "ray_token"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o400
        assert httpx.get(f"{services.dashboard_url}/api/serve/applications/", trust_env=False).status_code == 401
        with ServeApi(services.dashboard_url, token=secret.read_text()) as api:
            deployments = api.application(APP_NAME)["deployments"].values()
        assert {row["node_ip"] for deployment in deployments for row in deployment["replicas"]} == {services.WORKER}
