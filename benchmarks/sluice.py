"""Sluice as it is measured: everything on, one replica.

The processes are those of `sluice serve --local`: Ray, the deployment, the gateway with its bridge. Tokens are
verified, windows counted against a limit nobody reaches, the rollout decides, the ledger and metrics are written, the
access log goes to a file, and legacy stands by in the gateway. Started part by part, because the number of replicas is
held at one, as every peer has one worker; the profile `local` would start a second one in the middle of a measurement.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families

from app.auth import mint_token
from app.bench.targets import as_binary, as_json
from app.local_ray import LocalRay, LocalRayFailed
from app.serve_api import DeployFailed, ServeApi
from app.settings import PREFIX
from benchmarks.peers.served import ServedModel
from benchmarks.processes import NotUp, free_port, running
from benchmarks.request import HOST
from benchmarks.systems import Lane, Running
from serve_app.contract import FloatArray
from serve_app.registry import Registry
from serve_app.serve_config import DEPLOYMENT_NAME, ServedApplication, build_config
from serve_app.serve_config import ServedModel as Served

_TIMEOUT_S = 90.0
_UNREACHABLE_LIMIT = 1_000_000_000  # windows per minute
_ROLES = {"app.backends.bridge": "bridge", DEPLOYMENT_NAME: "replica"}


class Sluice:
    """The product, asked on its native route."""

    name = "sluice"
    lanes = ("json", "binary")

    @contextmanager
    def start(self, model: ServedModel, folder: Path) -> Iterator[Running]:
        secret = secrets.token_urlsafe(48)
        port = free_port()
        try:
            with LocalRay(num_cpus=max(2, os.cpu_count() or 1)) as ray:
                environment = {
                    **{name: "" for name in os.environ if name.startswith(PREFIX)},
                    **ray.environment,
                    "RAY_ADDRESS": ray.address,
                    **_gateway_environment(model, folder, secret),
                }
                command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
                log = folder / "gateway.log"
                with running(command, folder=folder, environment=environment, log=log) as gateway:
                    _deploy(ray, model)
                    _wait_for_both_arms(port)
                    yield _running(port, secret, gateway.pid, ray.pid)
        except (LocalRayFailed, DeployFailed) as error:
            raise NotUp(str(error)) from error


@dataclass(frozen=True)
class GatewayFigures:
    """What the gateway counted."""

    port: int
    headers: Mapping[str, str]

    def __call__(self) -> dict[str, Any]:
        """Windows by arm and replicas, since the start."""
        answer = httpx.get(f"http://{HOST}:{self.port}/metrics", headers=self.headers, trust_env=False, timeout=10.0)
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
        by_arm = {s.labels["arm"]: s.value for s in samples if s.name == "gateway_windows_total"}
        return {"windows_by_arm": by_arm}


def _running(port: int, secret: str, gateway: int, ray: int) -> Running:
    token = _token(secret, "predict")
    operator = {"Authorization": f"Bearer {_token(secret, 'ops')}"}
    return Running(
        port=port,
        lanes={
            "json": _native_lane("application/json", token),
            "binary": _native_lane("application/octet-stream", token),
        },
        roots=(gateway, ray),
        role=lambda pid, command: "gateway" if pid == gateway else _role_of(command),
        facts=GatewayFigures(port, operator),
    )


def _native_lane(content_type: str, token: str) -> Lane:
    encode = {"application/json": as_json, "application/octet-stream": as_binary}[content_type]
    return Lane(
        method="POST",
        path="/ray-serve/predict",
        headers={"Authorization": f"Bearer {token}", "Content-Type": content_type},
        body=lambda windows: encode(windows)[1],
        probabilities=_native_probabilities,
    )


def _native_probabilities(response: httpx.Response) -> npt.NDArray[np.floating[Any]]:
    answer = response.json()
    if answer["backend"] != "ray_serve":
        raise ValueError(f"answered by {answer['backend']}, not by Ray Serve")
    return np.array(answer["predictions"]["classification_probs"])


def _role_of(command: str) -> str:
    return next((role for part, role in _ROLES.items() if part in command), "ray system")


def _token(secret: str, scopes: str) -> str:
    return mint_token(
        secret.encode(),
        subject="benchmark",
        scopes=scopes.split(),
        issuer="sluice",
        audience="sluice",
        lifetime_s=86400,
        now=time.time(),
    )


def _gateway_environment(model: ServedModel, folder: Path, secret: str) -> dict[str, str]:
    return {
        "MODEL_REGISTRY_PATH": str(model.registry.resolve()),
        "GATEWAY_MODEL": model.model,
        "GATEWAY_ENGINE": model.engine,
        "GATEWAY_JWT_SECRET": secret,
        "GATEWAY_STATE_DIR": str(folder / "state"),
        "GATEWAY_RATE_LIMIT": str(_UNREACHABLE_LIMIT),
    }


def _deploy(ray: LocalRay, model: ServedModel) -> None:
    registry = str(model.registry.resolve())
    version = Registry(model.registry).resolve(model.model, "latest")
    serves = Served.model_validate(
        {"registry_path": registry, "model": model.model, "version": version, "engine": model.engine}
    )
    application = ServedApplication(serves=serves)
    config = build_config(application)
    (deployment,) = config["applications"][0]["deployments"]
    del deployment["autoscaling_config"]
    deployment["num_replicas"] = 1
    with ServeApi(ray.dashboard_url, token=ray.token_file.read_text()) as api:
        api.put(config)
        api.wait_running(application.name, timeout_s=_TIMEOUT_S, on_progress=lambda _: None, clock=time.monotonic)


def _wait_for_both_arms(port: int) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            arms = httpx.get(f"http://{HOST}:{port}/health", timeout=5.0, trust_env=False).json()["arms"]
        except httpx.HTTPError:
            arms = []
        if len(arms) > 1 and all(arm["status"] in ("healthy", "degraded") for arm in arms):
            return
        time.sleep(0.1)
    raise NotUp(f"not every arm of the gateway was healthy after {_TIMEOUT_S:.0f} s")
