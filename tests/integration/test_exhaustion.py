"""A gateway that runs out of files, of disk or of a reader for its log goes on answering."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.auth import mint_token
from tests.app.under_test import some_windows
from tests.integration.processes import ROOT, GatewayProcess, free_port, wait_until

pytestmark = pytest.mark.integration

RAW = {"Content-Type": "application/octet-stream"}
NOOP = {"GATEWAY_ENGINE": "noop", "RAY_ADDRESS": ""}


def predict(client: httpx.Client) -> int:
    return client.post("/ray-serve/predict", content=some_windows(1).tobytes(), headers=RAW).status_code


def test_without_file_descriptors_open_connections_are_served_and_new_ones_later(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = start_gateway(**NOOP)
    gateway.wait_for("legacy")
    (worker,) = gateway.worker_pids()
    with gateway.client() as client, contextlib.ExitStack() as crowd:
        assert predict(client) == 200
        in_use = len(list(Path(f"/proc/{worker}/fd").iterdir()))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (in_use + 20, in_use + 20))
        for _ in range(100):
            crowd.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=5))
        assert [predict(client) for _ in range(20)] == [200] * 20
        crowd.close()
        wait_until(lambda: gateway.arm_status("legacy") == "healthy", 20, "new connections to be served again")
        assert predict(client) == 200
    assert gateway.worker_pids() == [worker]


def dropped_lines(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("gateway_log_lines_dropped_total "))


@pytest.mark.parametrize("log", ["full disk", pytest.param("closed pipe", marks=pytest.mark.slow)])
def test_a_log_that_nobody_takes_costs_lines_and_no_request(tmp_path: Path, log: str) -> None:
    secret = "kZ4vR8nQ1xW6tY3mB7cF0hJ5sD9gL2pA"
    port = free_port()
    with logging_to_nobody(log) as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--port", str(port)],
            cwd=tmp_path,
            env={
                **{"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MODEL_REGISTRY_PATH": str(ROOT / "models")},
                **{"GATEWAY_JWT_SECRET": secret, "GATEWAY_DRAIN_NOTICE_MS": "0", **NOOP},
            },
            stdout=stream,
            stderr=stream,
        )
        token = mint_token(
            secret.encode(),
            subject="desk",
            scopes=["predict", "ops"],
            issuer="sluice",
            audience="sluice",
            lifetime_s=3600,
            now=float(np.datetime64("now").astype(float)),
        )
        headers = {"Authorization": f"Bearer {token}"}
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
                wait_until(lambda: answers(client), 60, "the gateway to answer")
                assert [predict(client) for _ in range(50)] == [200] * 50
                wait_until(lambda: dropped_lines(client) >= 50, 10, "lost lines to be counted")
        finally:
            process.terminate()
        assert process.wait(40) == 0


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def logging_to_nobody(kind: str) -> Iterator[int]:
    if kind == "full disk":
        with open("/dev/full", "wb") as full:
            yield full.fileno()
        return
    reading, writing = socket.socketpair()
    reading.close()
    with writing:
        yield writing.fileno()
