"""What a caller sees of a model that fails: the faulty engine as legacy, behind a whole gateway, in both protocols."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.backends.fake import FakeBackend
from app.backends.in_process import InProcessBackend, RegistrySource
from serve_app.contract import ModelOutputInvalid
from tests.app.under_test import GatewayUnderTest, MakeGateway, some_windows

MARK = 13.0


class Rig:
    """The gateway, and the file that tells its model what to do."""

    def __init__(self, gateway: GatewayUnderTest, file: Path) -> None:
        self.gateway = gateway
        self._file = file

    def tell(self, **fault: Any) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(fault))
        new.rename(self._file)

    async def ask(self, n_windows: int = 1, **headers: str) -> httpx.Response:
        return await self.gateway.predict(some_windows(n_windows), headers=headers)

    async def ask_open_inference(self) -> httpx.Response:
        tensor = {"name": "windows", "datatype": "FP32", "shape": [1, 50, 60], "data": some_windows(1).ravel().tolist()}
        path = "/v2/models/cnn_lstm/infer"
        return await self.gateway.client.post(path, json={"inputs": [tensor]}, headers=self.gateway.bearer())

    async def ready(self) -> dict[str, Any]:
        response = await self.gateway.client.get("/health/ready")
        return {"status": response.status_code, **response.json()["arms"][-1]}

    async def until(self, status: int) -> None:
        async with asyncio.timeout(20):
            while (await self.ready())["status"] != status:  # the prober's own time
                await asyncio.sleep(0.01)


@pytest.fixture
async def rig(make_gateway: MakeGateway, tmp_path: Path) -> AsyncIterator[Rig]:
    file = tmp_path / "fault.json"
    file.write_text("{}")
    source = RegistrySource(tmp_path, "cnn_lstm", "latest", "faulty", "cpu", 1, fault_file=file)
    async with make_gateway(backends=[InProcessBackend(source)]) as gateway:
        rig = Rig(gateway, file)
        await rig.until(200)
        yield rig
        rig.tell()


async def test_an_answer_that_is_not_finite_is_502_in_both_protocols_and_never_a_number(rig: Rig) -> None:
    rig.tell(behaviour="nan")
    for _ in range(5):
        native, protocol = await rig.ask(), await rig.ask_open_inference()
        assert (native.status_code, protocol.status_code) == (502, 502)
        assert native.json()["type"] == "urn:sluice:problem:model-output-invalid"
        assert protocol.json().keys() == {"error"}
        assert b"nan" not in native.content.lower() + protocol.content.lower()
    await rig.until(503)
    assert (await rig.ask()).status_code == 502
    rig.tell()
    await rig.until(200)
    assert (await rig.ask()).status_code == 200


async def test_a_batch_without_memory_is_answered_in_halves_or_told_to_come_back_after_a_second(rig: Rig) -> None:
    rig.tell(behaviour="oom", above_windows=8)
    assert len((await rig.ask(16)).json()["predictions"]["regression_pred"]) == 16
    rig.tell(behaviour="oom")
    refused = await rig.ask(16)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["type"] == "urn:sluice:problem:out-of-memory"


async def test_of_many_at_once_the_one_whose_windows_the_model_fails_on_fails_alone(rig: Rig) -> None:
    rig.tell(behaviour="raise", mark=MARK, ms=20)
    bad = some_windows(1)
    bad[0, 0, 0] = MARK
    bodies = [bad if number == 7 else some_windows(1, seed=number) for number in range(32)]
    answers = await asyncio.gather(*(rig.gateway.predict(body) for body in bodies))
    assert [answer.status_code for answer in answers] == [502 if number == 7 else 200 for number in range(32)]


async def test_a_model_that_hangs_costs_the_first_their_deadline_and_the_next_a_fast_503(rig: Rig) -> None:
    rig.tell(behaviour="hang")
    timeouts = await asyncio.gather(*(rig.ask(**{"X-Request-Timeout-Ms": "600"}) for _ in range(4)))
    assert {answer.status_code for answer in timeouts} == {504}
    await rig.until(503)
    started = asyncio.get_running_loop().time()
    refused = await rig.ask()
    assert refused.status_code == 503
    assert asyncio.get_running_loop().time() - started < 0.3
    assert refused.headers["retry-after"] == "5"
    health = await rig.gateway.client.get("/health")
    assert (health.status_code, health.json()["arms"][0]["status"]) == (503, "unhealthy")
    stats = await rig.gateway.client.get("/stats", headers=rig.gateway.bearer("ops"))
    assert stats.json()["backends"]["legacy"]["breaker"]["state"] == "open"
    text = (await rig.gateway.client.get("/metrics", headers=rig.gateway.bearer("ops"))).text
    assert 'gateway_breaker_state{arm="legacy"} 2.0' in text
    rig.tell()
    await rig.until(200)
    assert (await rig.ask()).status_code == 200


async def test_what_ray_serve_answers_with_nan_legacy_answers_and_it_is_counted(make_gateway: MakeGateway) -> None:
    canary, legacy = FakeBackend("ray_serve"), FakeBackend("legacy")
    canary.error = ModelOutputInvalid("the model's answer is not finite")
    async with make_gateway(backends=[canary, legacy]) as gateway:
        for _ in range(10):
            answer = await gateway.predict()
            assert (answer.status_code, answer.headers["x-served-by"]) == (200, "legacy")
            assert answer.headers["x-fallback"] == "model-output-invalid"
        text = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    assert 'gateway_fallbacks_total{reason="model-output-invalid"} 10.0' in text
