"""Sluice as it is measured: everything on, one replica.

The processes are those of `sluice serve --local`: Ray, the deployment, the gateway with its bridge. Tokens are
verified, windows counted against a limit nobody reaches, the rollout decides, the ledger and metrics are written, the
access log goes to a file, and legacy stands by in the gateway. Started part by part, because the number of replicas is
held at one, as every peer has one worker; the profile `local` would start a second one in the middle of a measurement.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
from prometheus_client.parser import text_string_to_metric_families

from app.auth import mint_token
from app.local_ray import LocalRay, LocalRayFailed
from app.serve_api import DeployFailed, ServeApi
from app.settings import PREFIX
from benchmarks.peers import lanes
from benchmarks.peers.catalogue import Model
from benchmarks.peers.lanes import BYTES, JSON, OIP_BINARY, Lane
from benchmarks.processes import NotUp, free_port, running
from benchmarks.request import HOST
from benchmarks.systems import Running, ray_role
from serve_app.contract import FloatArray
from serve_app.registry import Registry
from serve_app.serve_config import ServedApplication, ServedModel, build_config

_TIMEOUT_S = 90.0
_UNREACHABLE_LIMIT = 1_000_000_000  # windows per minute
_WORKER = "multiprocessing.spawn"
_BRIDGE = "app.backends.bridge"


class Sluice:
    """The product, asked on its native route in JSON and float32, and by the Open Inference Protocol in binary."""

    name = "sluice"
    title = "Sluice"
    lanes: tuple[str, ...] = ("json", "binary", "oip_binary")

    @contextmanager
    def start(self, model: Model, folder: Path) -> Iterator[Running]:
        """As `System.start`."""
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
                    _wait_for_both_arms(port, gateway, log)
                    yield _running(model, port, secret, gateway.pid, ray.pid)
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


def _running(model: Model, port: int, secret: str, gateway: int, ray: int) -> Running:
    token = {"Authorization": f"Bearer {_token(secret, 'predict')}"}
    operator = _token(secret, "ops admin")
    native = "/ray-serve/predict"
    return Running(
        port=port,
        lanes={
            "json": Lane(native, {**token, **JSON}, lanes.json_body("data"), from_native),
            "binary": Lane(native, {**token, **BYTES}, lanes.raw_body, from_native),
            "oip_binary": Lane(
                f"/v2/models/{model.name}/infer", {**token, **OIP_BINARY}, lanes.oip_binary_body, lanes.from_oip_binary
            ),
        },
        roots=(gateway, ray),
        role=lambda pid, command: "gateway" if pid == gateway else _role_of(command),
        facts=GatewayFigures(port, {"Authorization": f"Bearer {operator}"}),
        operator_token=operator,
    )


def from_native(response: bytes) -> FloatArray:
    """Class probabilities of an answer of the native route. Raises `ValueError` where legacy gave it."""
    answer = orjson.loads(response)
    if answer["backend"] != "ray_serve":
        raise ValueError(f"answered by {answer['backend']}, not by Ray Serve")
    return np.array(answer["predictions"]["classification_probs"], np.float32)


def _role_of(command: str) -> str:
    if _WORKER in command:
        return "gateway"
    return "bridge" if _BRIDGE in command else ray_role(command, "other")


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


def _gateway_environment(model: Model, folder: Path, secret: str) -> dict[str, str]:
    return {
        "MODEL_REGISTRY_PATH": str(model.registry.resolve()),
        "GATEWAY_MODEL": model.name,
        "GATEWAY_ENGINE": model.engine,
        "GATEWAY_JWT_SECRET": secret,
        "GATEWAY_STATE_DIR": str(folder / "state"),
        "GATEWAY_RATE_LIMIT": str(_UNREACHABLE_LIMIT),
    }


def _deploy(ray: LocalRay, model: Model) -> None:
    registry = str(model.registry.resolve())
    version = Registry(model.registry).resolve(model.name, "latest")
    serves = ServedModel.model_validate(
        {"registry_path": registry, "model": model.name, "version": version, "engine": model.engine}
    )
    application = ServedApplication(serves=serves)
    config = build_config(application)
    (deployment,) = config["applications"][0]["deployments"]
    del deployment["autoscaling_config"]
    deployment["num_replicas"] = 1
    with ServeApi(ray.dashboard_url, token=ray.token_file.read_text()) as api:
        api.put(config)
        api.wait_running(application.name, timeout_s=_TIMEOUT_S, on_progress=lambda _: None, clock=time.monotonic)


def _wait_for_both_arms(port: int, gateway: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        if gateway.poll() is not None:
            raise NotUp(f"the gateway ended with exit code {gateway.returncode} while starting; see {log}")
        try:
            arms = httpx.get(f"http://{HOST}:{port}/health", timeout=5.0, trust_env=False).json()["arms"]
        except httpx.HTTPError:
            arms = []
        if len(arms) > 1 and all(arm["status"] in ("healthy", "degraded") for arm in arms):
            return
        time.sleep(0.1)
    raise NotUp(f"not every arm of the gateway was healthy after {_TIMEOUT_S:.0f} s; see {log}")
