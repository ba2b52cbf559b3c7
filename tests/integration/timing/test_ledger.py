"""Every answer tells where its time went, and the account is true: a real gateway, its bridge, a replica, legacy."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.observability.ledger import STAGES
from tests.integration.processes import GatewayProcess
from tests.integration.sleeper import windows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

N_REQUESTS = 200
RAW = {"Content-Type": "application/octet-stream"}


class Account(NamedTuple):
    """A Server-Timing header, and what the client waited; all in milliseconds."""

    stages_ms: dict[str, float]
    total_ms: float
    waited_ms: float

    @property
    def sum_ms(self) -> float:
        return sum(self.stages_ms.values())

    @property
    def is_balanced(self) -> bool:
        """Within 5 %, or of the shortest requests within 0.1 ms."""
        return abs(self.sum_ms - self.total_ms) <= max(0.05 * self.total_ms, 0.1)


def account_of(response: httpx.Response, waited_ms: float) -> Account:
    entries = [entry.split(";dur=") for entry in response.headers["Server-Timing"].split(", ")]
    durations = {name: float(duration) for name, duration in entries}
    total = durations.pop("total")
    return Account(durations, total, waited_ms)


def raw(body: bytes) -> dict[str, Any]:
    return {"url": "/ray-serve/predict", "content": body, "headers": RAW}


def as_json(body: bytes) -> dict[str, Any]:
    return {"url": "/ray-serve/predict", "json": {"data": np.frombuffer(body, "<f4").reshape(-1, 50, 60).tolist()}}


def oip(body: bytes) -> dict[str, Any]:
    """The Open Inference Protocol with its binary tensor extension."""
    shape = [len(body) // 12000, 50, 60]
    tensor = {"name": "windows", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(body)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {**RAW, "Inference-Header-Content-Length": str(len(head))}
    return {"url": "/v2/models/cnn_lstm/infer", "content": head + body, "headers": headers}


def ask(http: httpx.Client, arm: str, request: dict[str, Any]) -> Account:
    headers = {**request.get("headers", {}), "X-Route-To": arm}
    started = time.perf_counter()
    response = http.post(**{**request, "headers": headers})
    waited_ms = 1e3 * (time.perf_counter() - started)
    assert (response.status_code, response.headers["X-Served-By"]) == (200, arm), response.text
    return account_of(response, waited_ms)


def medians(accounts: list[Account]) -> dict[str, float]:
    return {stage: round(statistics.median(account.stages_ms[stage] for account in accounts), 3) for stage in STAGES}


@pytest.mark.parametrize("form", [raw, as_json, oip])
@pytest.mark.parametrize("arm", ["ray_serve", "legacy"])
def test_stages_add_up_to_the_total(
    gateway_with_legacy: GatewayProcess, arm: str, form: Callable[[bytes], dict[str, Any]]
) -> None:
    request = form(windows(0))
    with gateway_with_legacy.client() as http:
        accounts = [ask(http, arm, request) for _ in range(N_REQUESTS)]
    total, waited = (statistics.median(getattr(account, name) for account in accounts) for name in Account._fields[1:])
    share = statistics.median(account.sum_ms / account.total_ms for account in accounts)
    print(f"\n{arm}, {form.__name__}, medians in ms: {medians(accounts)}")
    print(f"total {total:.3f}, sum over total {share:.4f}, client waited {waited:.3f}")
    assert all(set(account.stages_ms) == set(STAGES) for account in accounts)
    assert share == pytest.approx(1, abs=0.05)
    assert all(account.is_balanced for account in accounts)
    assert all(account.total_ms < account.waited_ms for account in accounts)


async def test_stages_add_up_under_load_for_requests_of_every_size(gateway_with_legacy: GatewayProcess) -> None:
    """Requests that share groups, and requests that are split over groups and batches."""
    rng = np.random.default_rng(3)
    async with many_connections(gateway_with_legacy) as http:

        async def caller() -> list[httpx.Response]:
            bodies = [windows(*[0.2] * int(size)) for size in rng.integers(1, 48, size=20)]
            return [await http.post("/ray-serve/predict", content=body) for body in bodies]

        responses = [response for told in await asyncio.gather(*(caller() for _ in range(8))) for response in told]
    assert {response.status_code for response in responses} <= {200, 503}
    accounts = [account_of(response, 0) for response in responses]
    answered = [a for a, response in zip(accounts, responses, strict=True) if response.status_code == 200]
    print(f"\n8 callers, 1 to 47 windows, {len(answered)} answered, medians in ms: {medians(answered)}")
    assert len(answered) >= len(responses) // 2
    assert all(account.is_balanced for account in accounts), [a for a in accounts if not a.is_balanced]


def test_histograms_hold_what_the_headers_tell(gateway_with_legacy: GatewayProcess) -> None:
    with gateway_with_legacy.client() as http:
        before = stage_sums_s(http)
        accounts = [ask(http, "ray_serve", raw(windows(2))) for _ in range(50)]
        after = stage_sums_s(http)
    for stage in STAGES:
        count, seconds = (after[stage][index] - before[stage][index] for index in (0, 1))
        assert count == len(accounts)
        told_ms = sum(account.stages_ms[stage] for account in accounts)
        assert 1e3 * seconds == pytest.approx(told_ms, rel=0.01, abs=0.05), stage


def stage_sums_s(http: httpx.Client) -> dict[str, tuple[float, float]]:
    """Count and sum of `gateway_stage_seconds` by stage."""
    found: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name in ("gateway_stage_seconds_count", "gateway_stage_seconds_sum"):
                found[sample.labels["stage"]][sample.name.rpartition("_")[2]] = sample.value
    return {stage: (row["count"], row["sum"]) for stage, row in found.items()}


async def test_time_is_booked_where_it_was_spent(gateway_with_legacy: GatewayProcess) -> None:
    async with many_connections(gateway_with_legacy) as http:

        async def stages(sleep_ms: float) -> dict[str, float]:
            response = await http.post("/ray-serve/predict", content=windows(sleep_ms))
            assert response.status_code == 200, response.text
            return account_of(response, 0).stages_ms

        alone = await stages(50)
        tasks = [asyncio.create_task(stages(1000))]  # keeps the model busy
        await asyncio.sleep(0.1)
        for _ in range(8):
            tasks.append(asyncio.create_task(stages(0)))
            await asyncio.sleep(0.01)
        first, *_, last = (await asyncio.gather(*tasks))[1:]
    assert 50 <= alone["model"] < 100
    assert alone["queue"] + alone["batch"] < 50
    assert first["batch"] > 100  # at the model, behind the forward pass
    assert last["queue"] > 100  # in the gateway, behind full slots


def many_connections(gateway: GatewayProcess) -> httpx.AsyncClient:
    headers = {**gateway.headers(), **RAW, "X-Route-To": "ray_serve"}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=gateway.url, headers=headers, limits=limits, timeout=5, trust_env=False)


REFUSALS: dict[int, tuple[str, dict[str, Any]]] = {
    401: ("auth", {"headers": {"Authorization": "Bearer x"}}),
    403: ("decode", {"headers": {"X-Route-Key": "k"}}),
    400: ("decode", {"headers": {"X-Request-Timeout-Ms": "soon"}}),
    415: ("decode", {"headers": {"Content-Type": "text/plain"}}),
    422: ("decode", {"content": b"1234"}),
    504: ("transport", {"content": windows(300), "headers": {"X-Request-Timeout-Ms": "100"}}),
}


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_tells_how_far_the_request_came(gateway_with_legacy: GatewayProcess, status: int) -> None:
    last, fault = REFUSALS[status]
    headers = {**RAW, "X-Route-To": "ray_serve", **fault.get("headers", {})}
    with gateway_with_legacy.client() as http:
        response = http.post("/ray-serve/predict", content=fault.get("content", windows(0)), headers=headers)
    assert response.status_code == status
    account = account_of(response, 0)
    assert list(account.stages_ms)[-1] == last
    assert account.is_balanced
