"""The kill switch over two real gateways, one of two workers, and a real Redis that goes and comes."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.rollout.audit import verify
from serve_app.contract import N_FEATURES, N_STEPS
from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.integration

WINDOW = np.zeros((1, N_FEATURES, N_STEPS), "<f4").tobytes()
PROMISED_S = 1.0


class Gateways:
    """Two gateways that share a Redis: the first has two workers, the second one."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self._folder = folder
        self._secret = secrets.token_urlsafe(48)
        self._environment = {
            "GATEWAY_ENGINE": "noop",
            "GATEWAY_RAY_SERVE_FRACTION": "0.0",
            "GATEWAY_INSTANCES": "2",
            "GATEWAY_STICKY_KEY": secrets.token_hex(16),
            "REDIS_URL": redis.url,
        }
        self.one, self.other = self.begin("one", 2), self.begin("other", 1)
        self.wait()

    def begin(self, name: str, workers: int) -> GatewayProcess:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        return GatewayProcess(folder, {**self._environment, "GATEWAY_WORKERS": str(workers)}, secret=self._secret)

    def wait(self) -> None:
        for gateway, workers in ((self.one, 2), (self.other, 1)):
            gateway.wait_for("legacy")
            wait_until(lambda g=gateway, n=workers: len(g.worker_pids()) >= n, 30, "all workers")

    def restart_one(self) -> None:
        self.one.stop()
        self.one = self.begin("one", 2)
        self.wait()

    def stop(self) -> None:
        for gateway in (self.one, self.other):
            gateway.stop()

    def audit_log(self, name: str) -> Path:
        return self._folder / name / ".run" / "state" / "audit.jsonl"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Gateways]:
    gateways = Gateways(tmp_path_factory.mktemp("gateways"), redis)
    try:
        yield gateways
    finally:
        gateways.stop()


def say(gateway: GatewayProcess, scope: str, name: str = "", *, killed: bool = True) -> dict[str, Any]:
    body = {"scope": scope, "name": name, "killed": killed, "reason": "a test"}
    with gateway.client() as client:
        response = client.put("/kill", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def ask(gateway: GatewayProcess, symbol: str = "MSFT") -> int:
    """The status of a prediction, over a connection of its own: any worker may get it."""
    headers = {"Content-Type": "application/octet-stream", "X-Symbol": symbol, **gateway.headers("predict")}
    url = f"{gateway.url}/ray-serve/predict"
    return httpx.post(url, content=WINDOW, headers=headers, timeout=10, trust_env=False).status_code


def all_say(gateway: GatewayProcess, status: int, symbol: str = "MSFT", looks: int = 16) -> bool:
    return all(ask(gateway, symbol) == status for _ in range(looks))


@contextmanager
def asked_all_the_time(gateway: GatewayProcess) -> Iterator[list[tuple[float, int]]]:
    """The moment of every answer, and its status."""
    answers: list[tuple[float, int]] = []
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            status = ask(gateway)
            answers.append((time.monotonic(), status))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        yield answers
    finally:
        is_over.set()
        for worker in workers:
            worker.join()


def test_within_a_second_no_worker_of_any_gateway_answers(gateways: Gateways) -> None:
    with asked_all_the_time(gateways.one) as at_one, asked_all_the_time(gateways.other) as at_other:
        time.sleep(0.5)
        called_at = time.monotonic()
        done = say(gateways.one, "symbol", "MSFT")
        told_s = time.monotonic() - called_at
        time.sleep(1.5)
    assert done["reached"] == "all gateways"
    for name, answers in (("here, two workers", at_one), ("another gateway", at_other)):
        before = [at - called_at for at, status in answers if status == 200]
        after = [status for at, status in answers if at - called_at > PROMISED_S]
        print(f"\nkill switch, {name}: last answer {max(before):+.3f} s after the call (told after {told_s:.3f} s)")
        assert max(before) < PROMISED_S
        assert after
        assert set(after) == {503}
    assert all_say(gateways.one, 200, "AAPL")

    say(gateways.other, "symbol", "MSFT", killed=False)
    time.sleep(PROMISED_S)
    assert all_say(gateways.one, 200)
    assert ask(gateways.other) == 200


def test_without_redis_a_kill_reaches_its_own_gateway_and_the_others_when_redis_is_back(
    gateways: Gateways, redis: RedisServer
) -> None:
    redis.kill()
    called_at = time.monotonic()
    with asked_all_the_time(gateways.one) as answers:
        done = say(gateways.one, "global")
        time.sleep(1.5)
    assert done["reached"] == "this gateway: Redis is away"
    last_s = max([at - called_at for at, status in answers if status == 200], default=0.0)
    print(f"\nkill switch without Redis: last answer of two workers {last_s:+.3f} s after the call")
    assert last_s < PROMISED_S
    assert ask(gateways.other) == 200

    gateways.restart_one()
    assert all_say(gateways.one, 503)

    redis.start()  # and knows nothing
    started_at = time.monotonic()
    wait_until(lambda: ask(gateways.other) == 503, 10, "the other gateway to hear of it")
    print(f"kill switch: the other gateway refuses {time.monotonic() - started_at:.3f} s after Redis is back")

    assert say(gateways.other, "global", killed=False)["reached"] == "all gateways"
    time.sleep(PROMISED_S)
    assert all_say(gateways.one, 200)


def test_each_gateways_chain_is_whole_and_tells_of_the_others_changes(gateways: Gateways) -> None:
    one, other = gateways.audit_log("one"), gateways.audit_log("other")
    assert verify(one).records
    assert verify(other).records
    assert '"action":"kill"' in one.read_text()
    assert other.read_text().count('"action":"seen"') == 2
    assert one.read_text().count('"action":"seen"') == 2  # once, whichever worker saw it
