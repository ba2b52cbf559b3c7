"""Thousands of hostile requests against a gateway as an operator starts it, over sockets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.integration.hostile_requests import MARK, Hostile, corpus
from tests.integration.processes import GatewayProcess

pytestmark = pytest.mark.integration

N_CONNECTIONS = 4
MAX_GROWTH_BYTES = 32 << 20


class Answered(NamedTuple):
    request: Hostile
    status: int
    headers: dict[str, str]
    body: bytes


async def ask_all(port: int, requests: Iterable[Hostile]) -> list[Answered]:
    """Send every request, a few at a time, each connection used as long as the server keeps it."""
    waiting = iter(requests)
    answers: list[Answered] = []

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            answered = await asyncio.wait_for(ask(reader, writer, request), 20)
            answers.append(answered)
            if answered.headers.get("connection") == "close":
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    await asyncio.gather(*(work() for _ in range(N_CONNECTIONS)))
    return answers


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Hostile) -> Answered:
    writer.write(request.raw)
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return Answered(request, int(status_line.split()[1]), headers, body)


def resident_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return 1024 * int(line.split()[1])


def assert_refusal(answered: Answered) -> None:
    """One of the two forms in which the gateway refuses, short, and quoting nothing."""
    status, headers, body = answered.status, answered.headers, answered.body
    assert 400 <= status < 500, answered
    assert len(body) <= 4096
    assert headers["x-content-type-options"] == "nosniff"
    document = json.loads(body)
    is_open = answered.request.head.split()[1].startswith(b"/v2") and headers["content-type"] == "application/json"
    if is_open:
        assert list(document) == ["error"]
    else:
        assert headers["content-type"] == "application/problem+json"
        assert {"type", "title", "status", "detail", "instance"} <= document.keys()
        assert document["status"] == status
    assert MARK not in body.decode() + str(headers)
    assert "Traceback" not in body.decode()
    assert "/work" not in body.decode()


def series(gateway: GatewayProcess) -> set[str]:
    with gateway.client() as client:
        text = client.get("/metrics").text
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def count_requests(gateway: GatewayProcess) -> int:
    with gateway.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("http_requests_total{"))


@pytest.fixture
def gateway(start_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    gateway = start_gateway(
        GATEWAY_ENGINE="noop", GATEWAY_RATE_LIMIT="1000000000", GATEWAY_OPS_RATE_LIMIT="1000000000", RAY_ADDRESS=""
    )
    gateway.wait_for("legacy")
    return gateway


def test_every_hostile_request_is_refused_in_form_and_leaves_nothing_behind(gateway: GatewayProcess) -> None:
    bearer = gateway.headers("predict ops admin")["Authorization"]
    requests = list(corpus(bearer))
    must_be_refused = sum(request.must_be_refused for request in requests)
    assert must_be_refused >= 5000
    (worker,) = gateway.worker_pids()
    asyncio.run(ask_all(gateway.port, requests[::100]))  # what is made once and kept
    before_bytes = resident_bytes(worker)
    answers = asyncio.run(ask_all(gateway.port, requests))
    growth_bytes = resident_bytes(worker) - before_bytes
    print(Counter(answered.status for answered in answers), f"worker grew by {growth_bytes / 2**20:.1f} MiB")
    assert len(answers) == len(requests)
    for answered in answers:
        if answered.request.must_be_refused or answered.status >= 400:
            assert_refusal(answered)
        else:
            assert answered.status == 200
    assert gateway.worker_pids() == [worker]
    assert growth_bytes < MAX_GROWTH_BYTES
    assert len(series(gateway)) < 1500
    assert not [name for name in series(gateway) if MARK in name]
    assert httpx.get(f"{gateway.url}/health", trust_env=False).status_code == 200
    n_requests = 1 + count_requests(gateway)  # a scrape does not see itself
    gateway.stop()
    assert_log(gateway, n_requests)


def assert_log(gateway: GatewayProcess, n_requests: int) -> None:
    """One line for each request that was one, all of them JSON, nothing of the caller's making in any."""
    raw = gateway.log.read_bytes()
    assert raw.isascii()
    assert not set(raw) & ({*range(32), 127} - {ord("\n")})
    lines: list[dict[str, Any]] = [json.loads(line) for line in raw.splitlines()]
    assert sum(line["event"] == "request" for line in lines) == n_requests
    assert not [line for line in lines if line["level"] == "error"]
    assert MARK not in raw.decode()
