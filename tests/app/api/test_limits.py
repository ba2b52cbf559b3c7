"""Limits as a caller meets them: of windows, of other requests, and of what is under way."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.app.under_test import GatewayUnderTest, MakeGateway, some_windows


def infer_body(n_windows: int) -> dict[str, object]:
    windows = some_windows(n_windows)
    tensor = {"name": "windows", "datatype": "FP32", "shape": list(windows.shape), "data": windows.ravel().tolist()}
    return {"inputs": [tensor]}


async def until(gateway: GatewayUnderTest, calls: int) -> None:
    async with asyncio.timeout(5):
        while len(gateway.calls()) < calls:
            await asyncio.sleep(0.001)


async def test_every_way_to_predict_spends_one_quota(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=6) as gateway:
        assert (await gateway.predict(some_windows(2))).status_code == 200
        for path in ("/v2/models/cnn_lstm/infer", "/v2/models/cnn_lstm/versions/1/infer"):
            response = await gateway.client.post(path, json=infer_body(2), headers=gateway.bearer())
            assert response.status_code == 200
        assert (await gateway.predict()).status_code == 429
        response = await gateway.client.post(path, json=infer_body(1), headers=gateway.bearer())
        assert response.status_code == 429
        assert list(response.json()) == ["error"]


async def test_other_requests_have_a_limit_of_their_own_whatever_their_path(make_gateway: MakeGateway) -> None:
    async with make_gateway(ops_rate_limit=4) as gateway:

        async def get(path: str, subject: str = "ann") -> httpx.Response:
            return await gateway.client.get(path, headers=gateway.bearer("ops predict", subject))

        for path in ("/stats", "/rollout", "/metrics", "/v2/models/cnn_lstm"):
            assert (await get(path)).status_code == 200
        refused = await get("/stats")
        assert refused.status_code == 429
        assert refused.json()["violated-policies"] == ["ops"]
        assert refused.headers["ratelimit-policy"] == '"ops";q=4;w=60'
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert (await get("/stats", "ben")).status_code == 200
        assert (await gateway.predict(subject="ann")).status_code == 200
        assert (await get("/health/ready")).status_code == 200


async def test_so_many_of_one_principal_are_under_way_and_the_next_is_told(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_concurrent=2, rate_limit=3) as gateway:
        gateway.ray_serve.gate.clear()
        under_way = [asyncio.create_task(gateway.predict()) for _ in range(2)]
        await until(gateway, 2)
        refused = await gateway.predict()
        assert refused.status_code == 429
        assert refused.json()["type"] == "urn:sluice:problem:too-many-at-once"
        assert refused.json()["violated-policies"] == ["concurrency"]
        assert refused.headers["retry-after"] == "1"
        other = asyncio.create_task(gateway.predict(subject="another"))
        await until(gateway, 3)
        gateway.ray_serve.gate.set()
        assert {response.status_code for response in await asyncio.gather(*under_way, other)} == {200}
        assert (await gateway.predict()).status_code == 200  # of a limit of three: the refused one had spent nothing


@pytest.mark.parametrize("ending", ["a bad body", "the deadline", "a failure", "the caller leaves"])
async def test_a_place_is_free_again_however_a_request_ended(make_gateway: MakeGateway, ending: str) -> None:
    async with make_gateway(max_concurrent=1, legacy="off") as gateway:
        match ending:
            case "a bad body":
                assert (await gateway.predict(body=b"x")).status_code == 422
            case "the deadline":
                gateway.ray_serve.gate.clear()
                response = await gateway.predict(scopes="predict ops", headers={"X-Request-Timeout-Ms": "10"})
                assert response.status_code in {200, 504}
            case "a failure":
                gateway.ray_serve.error = gateway.legacy.error = RuntimeError("planted")
                assert (await gateway.predict()).status_code == 500
            case "the caller leaves":
                gateway.ray_serve.gate.clear()
                request = asyncio.create_task(gateway.predict())
                await until(gateway, 1)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
        gateway.ray_serve.gate.set()
        gateway.ray_serve.error = gateway.legacy.error = None
        assert (await gateway.predict()).status_code == 200
        assert gateway.app.state.gateway.limits.concurrency.under_way == {}


async def test_what_limits_decided_is_counted_by_policy_and_mode(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=1) as gateway:
        assert [(await gateway.predict()).status_code for _ in range(3)] == [200, 429, 429]
        text = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
        assert 'decisions_total{mode="memory",outcome="refused",policy="predict"} 2.0' in text
        assert 'decisions_total{mode="memory",outcome="admitted",policy="ops"} 1.0' in text
        assert "gateway_rate_limit_local 0.0" in text


async def test_single_accounts_have_limits_of_their_own_and_are_told_them(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=2, rate_limits={"tenant:fund-a": 4, "sub:ann": 1, "sub:fund-a": 3}) as gateway:
        for subject, tenant, limit in (("x", "fund-a", 4), ("ann", None, 1), ("fund-a", None, 3), ("ann", "fund-b", 2)):
            headers = gateway.bearer("predict", subject, tenant)
            answers = [await gateway.predict(headers=headers) for _ in range(limit + 1)]
            assert [answer.status_code for answer in answers] == [200] * limit + [429]
            assert {answer.headers["ratelimit-policy"] for answer in answers} == {f'"predict";q={limit};w=60'}


async def test_who_looks_too_often_can_still_stop_everything(make_gateway: MakeGateway) -> None:
    async with make_gateway(ops_rate_limit=2) as gateway:
        operator = gateway.bearer("ops admin")
        looks = [(await gateway.client.get("/rollout", headers=operator)).status_code for _ in range(3)]
        assert looks == [200, 200, 429]
        kill = {"scope": "global", "killed": True, "reason": "feed is wrong"}
        assert (await gateway.client.put("/kill", json=kill, headers=operator)).status_code == 200
