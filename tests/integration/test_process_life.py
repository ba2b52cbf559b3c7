"""The gateway's processes: a supervisor that holds the socket, workers that come and go under it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.integration.processes import GatewayProcess, wait_until

pytestmark = pytest.mark.integration

StartGateway = Callable[..., GatewayProcess]
_BODY = np.zeros((1, 50, 60), "<f4").tobytes()
_NO_RAY = {"GATEWAY_ENGINE": "noop", "GATEWAY_DRAIN_NOTICE_MS": "500"}


class Callers(threading.Thread):
    """Asks one prediction after another, every second one on a new connection; counts what came of each."""

    def __init__(self, gateway: GatewayProcess) -> None:
        super().__init__(daemon=True)
        self.outcomes: Counter[str] = Counter()
        self._gateway = gateway
        self._ends = threading.Event()

    def run(self) -> None:
        with self._client() as kept:
            while not self._ends.wait(0.01):
                self.outcomes[self._ask(kept)] += 1
                with self._client() as fresh:
                    self.outcomes[self._ask(fresh)] += 1

    def end(self) -> Counter[str]:
        self._ends.set()
        self.join(30)
        return self.outcomes

    def _client(self) -> httpx.Client:
        headers = {**self._gateway.headers("predict"), "Content-Type": "application/octet-stream"}
        return httpx.Client(base_url=self._gateway.url, headers=headers, timeout=10.0, trust_env=False)

    @staticmethod
    def _ask(client: httpx.Client) -> str:
        try:
            return str(client.post("/ray-serve/predict", content=_BODY).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__


def test_a_killed_worker_is_replaced_and_new_connections_wait_for_it(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**_NO_RAY)
    gateway.wait_for("legacy")
    (worker,) = gateway.worker_pids()
    os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    answer = httpx.get(f"{gateway.url}/health/live", timeout=15.0, trust_env=False)
    assert answer.status_code == 200
    gateway.wait_for("legacy", timeout_s=15.0)
    print(f"a lone worker was killed; its successor answered after {time.monotonic() - began:.1f} s")
    assert gateway.worker_pids() != [worker]
    assert gateway.is_alive()


def test_sighup_replaces_every_worker_and_no_request_is_lost(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**_NO_RAY)
    gateway.wait_for("legacy")
    callers = Callers(gateway)
    callers.start()
    for _ in range(2):
        (worker,) = gateway.worker_pids()
        os.kill(gateway.pid, signal.SIGHUP)
        wait_until(lambda old=worker: worker_is_alone(gateway, old), 60, "another worker to be alone")
    outcomes = callers.end()
    print(f"two rolling restarts: {dict(outcomes)}")
    assert outcomes.total() > 50
    assert set(outcomes) == {"200"}


def worker_is_alone(gateway: GatewayProcess, old: int) -> bool:
    pids = gateway.worker_pids()
    return len(pids) == 1 and pids != [old]


def test_sigterm_is_told_to_callers_answers_them_and_ends_with_0(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**{**_NO_RAY, "GATEWAY_DRAIN_NOTICE_MS": "2000"})
    gateway.wait_for("legacy")
    with gateway.client() as client:
        assert client.get("/health/ready").status_code == 200
        os.kill(gateway.pid, signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 503, 2.0, "the notice")
        answer = client.post("/ray-serve/predict", content=_BODY, headers={"Content-Type": "application/octet-stream"})
        assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
    assert gateway.stop() == 0


def test_workers_end_with_their_supervisor(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**_NO_RAY)
    gateway.wait_for("legacy")
    (worker,) = gateway.worker_pids()
    os.kill(gateway.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), 15.0, "the worker to end")


@pytest.mark.slow
def test_a_worker_that_does_not_end_is_killed_and_no_worker_is_added_by_signals(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**_NO_RAY)
    gateway.wait_for("legacy")
    os.kill(gateway.pid, signal.SIGTTIN)
    time.sleep(1.5)  # two turns of the supervisor
    (worker,) = gateway.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    os.kill(gateway.pid, signal.SIGTERM)
    assert gateway.stop() == 0  # waits 40 s, more than notice, drain and grace together
    assert not Path(f"/proc/{worker}").exists()


def test_a_signal_to_end_is_heeded_in_the_midst_of_a_restart(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**{**_NO_RAY, "GATEWAY_DRAIN_NOTICE_MS": "0"})
    gateway.wait_for("legacy")
    workers = gateway.worker_pids()
    os.kill(gateway.pid, signal.SIGHUP)
    wait_until(lambda: len(gateway.worker_pids()) == 2, 20.0, "the next worker")
    began = time.monotonic()
    assert gateway.stop() == 0
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM in a restart")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("after_s", [0.1, 0.4, 0.8])
def test_a_worker_whose_supervisor_dies_while_it_starts_ends_and_leaves_the_port(
    start_gateway: StartGateway, after_s: float
) -> None:
    gateway = start_gateway(**_NO_RAY)
    wait_until(lambda: bool(gateway.worker_pids()), 20.0, "a worker")
    time.sleep(after_s)  # somewhere in its imports
    workers = gateway.worker_pids()
    os.kill(gateway.pid, signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20.0, "the worker to end")
