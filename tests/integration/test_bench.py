"""The load test against what it is for: a gateway with Ray Serve behind it, and the deployment's handle alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.local_ray import LocalRay
from serve_app.serve_config import ServedApplication, ServedModel
from tests.integration.processes import ROOT, GatewayProcess, deploy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def bench(folder: Path, environment: dict[str, str], *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "app.cli", "bench", "--requests", "60", "--concurrency", "3", "--json", *words]
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert result.stdout, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (0 if found["meets_requirements"] else 1)
    return found


def test_every_request_is_answered_by_ray_through_gateway_and_handle(
    ray_cluster: LocalRay, start_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    deploy(ray_cluster, ServedApplication(serves=ServedModel(registry_path=str(ROOT / "models"))))
    environment = {**ray_cluster.environment, "RAY_ADDRESS": ray_cluster.address}
    gateway = start_gateway(**environment)
    gateway.wait_for("ray_serve")
    token = gateway.headers("predict")["Authorization"].removeprefix("Bearer ")

    over_http = bench(tmp_path, environment, "--url", gateway.url, "--token", token, "--windows", "2", "--body", "json")
    by_handle = bench(tmp_path, environment, "--target", "handle")
    for found in (over_http, by_handle):
        assert (found["total_requests"], found["succeeded"], found["errors"]) == (60, 60, {})
        assert found["served_by"] == {"ray_serve": 60}
    assert over_http["windows_per_request"] == 2
