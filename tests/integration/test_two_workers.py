"""Two workers of a real gateway and a real Redis: one limit, one share, and neither is lost with Redis."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.local_ray import descendants
from serve_app.contract import N_FEATURES, N_STEPS
from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.integration

LIMIT = 200
PASSWORD = "canary-9f3b7c51d2e84a60"
WINDOW = np.zeros((1, N_FEATURES, N_STEPS), "<f4").tobytes()
PREDICT = "/ray-serve/predict"
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("gateway")
    password_file = folder / "redis_password"
    password_file.write_text(PASSWORD)
    password_file.chmod(0o600)
    gateway = GatewayProcess(
        folder,
        {
            "GATEWAY_WORKERS": "2",
            "GATEWAY_ENGINE": "noop",
            "GATEWAY_RATE_LIMIT": str(LIMIT),
            "GATEWAY_RAY_SERVE_FRACTION": "0.0",
            "REDIS_URL": redis.url,
            "GATEWAY_REDIS_PASSWORD_FILE": str(password_file),
        },
    )
    try:
        gateway.wait_for("legacy")
        wait_until(lambda: len(gateway.worker_pids()) == 2, 30, "both workers")
        yield gateway
    finally:
        gateway.stop()


async def ask(gateway: GatewayProcess, count: int, subject: str) -> list[httpx.Response]:
    """Predictions over connections of their own each, so that both workers get some."""
    headers = {**gateway.headers("predict", subject), **BINARY, "Connection": "close"}
    limits = httpx.Limits(max_connections=8)
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, limits=limits, trust_env=False) as client:
        return await asyncio.gather(*(client.post(PREDICT, content=WINDOW, timeout=10) for _ in range(count)))


def statuses(responses: list[httpx.Response]) -> Counter[int]:
    return Counter(response.status_code for response in responses)


def modes(responses: list[httpx.Response]) -> set[str]:
    return {response.headers.get("x-ratelimit-mode", "shared") for response in responses}


def shares(gateway: GatewayProcess, looks: int = 16) -> set[float]:
    """What several new connections are told of the share, so that both workers are asked."""
    found = set()
    for _ in range(looks):
        with gateway.client() as client:
            found.add(client.get("/rollout").json()["ray_serve_fraction"])
    return found


async def test_one_limit_for_both_workers_also_without_redis_and_again_with_it(
    gateway: GatewayProcess, redis: RedisServer
) -> None:
    answered = await ask(gateway, LIMIT + 50, "one")
    assert statuses(answered)[200] == pytest.approx(LIMIT, rel=0.05)

    redis.kill()
    answered = await ask(gateway, LIMIT + 50, "two")
    assert set(statuses(answered)) == {200, 429}
    # Half of it each; how connections fall to the workers is chance, and so is whether the first still saw Redis.
    assert LIMIT / 2 <= statuses(answered)[200] <= 1.05 * LIMIT
    assert {response.headers["ratelimit-policy"] for response in answered[-20:]} == {f'"predict";q={LIMIT // 2};w=60'}
    spent_before = await ask(gateway, 40, "one")
    assert statuses(spent_before)[200] < LIMIT / 4  # each worker goes on from what it admitted

    redis.start()
    started_at = time.monotonic()
    while modes(await ask(gateway, 8, "three")) != {"shared"}:
        assert time.monotonic() - started_at < 5
        await asyncio.sleep(0.2)


def test_one_share_for_both_workers_which_stays_while_redis_is_away(
    gateway: GatewayProcess, redis: RedisServer
) -> None:
    with gateway.client() as client:
        assert client.put("/rollout", json={"ray_serve_fraction": 0.25}).status_code == 200
        time.sleep(1.0)
        assert shares(gateway) == {0.25}

        redis.kill()
        refused = client.put("/rollout", json={"ray_serve_fraction": 0.5})
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:sluice:problem:state-unavailable")
        assert shares(gateway) == {0.25}

        redis.start()  # and knows nothing
        wait_until(lambda: "0.25" in redis.say("HGET", "sluice:state:rollout", "document"), 5, "the share in Redis")
        assert client.put("/rollout", json={"ray_serve_fraction": 0.75}).status_code == 200
        time.sleep(1.0)
        assert shares(gateway) == {0.75}


def test_the_password_shows_nowhere(gateway: GatewayProcess, redis: RedisServer) -> None:
    with gateway.client() as client:
        said = [client.get(path).text for path in ("/stats", "/metrics", "/health", "/rollout")]
    for pid in [gateway.pid, *descendants(gateway.pid)]:
        said += [Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
    said.append(gateway.log.read_text())
    assert "Redis is away" in said[-1]
    assert not [text for text in said if PASSWORD in text]
