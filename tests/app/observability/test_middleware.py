from __future__ import annotations

import pytest

from tests.app.under_test import GatewayUnderTest, MakeGateway

MARK = "qx-marks-the-echo"


async def test_every_answer_carries_an_id_and_the_common_headers(gateway: GatewayUnderTest) -> None:
    for path in ("/health/live", "/nope", "/stats", "/openapi.json"):
        response = await gateway.client.get(path, headers={"X-Request-Id": "mine"})
        assert len(response.headers["x-request-id"]) == 32
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers


async def test_one_line_per_request_without_payload_or_token(make_gateway: MakeGateway) -> None:
    async with make_gateway() as gateway:
        token = gateway.token()
        await gateway.predict(headers={"X-Request-Id": "order-17"})
        await gateway.predict(body=MARK.encode(), headers={"X-Request-Id": f"{MARK}\u2028".encode()})  # type: ignore[dict-item]
        await gateway.client.get(f"/{MARK}?{MARK}={MARK}", headers={"User-Agent": MARK, "Referer": MARK})
        await gateway.client.get("/stats", headers={"Authorization": f"Bearer {MARK}"})
        await gateway.client.request(MARK.upper(), "/health/live")
    lines = [line for line in gateway.log_lines() if line["event"] == "request"]
    assert [(line["route"], line["method"], line["status"]) for line in lines] == [
        ("/ray-serve/predict", "POST", 200),
        ("/ray-serve/predict", "POST", 422),
        ("none", "GET", 404),
        ("/stats", "GET", 401),
        ("/health/live", "other", 405),
    ]
    answered, refused = lines[:2]
    assert answered["client_request_id"] == "order-17"
    assert answered["windows"] == 1
    assert answered["arm"] == "ray_serve"
    assert answered["model_version"] == "1"
    assert refused["error"] == "invalid-input"
    written = "\n".join(str(line) for line in gateway.log_lines() if line.get("logger") != "httpx")
    assert MARK not in written
    assert MARK.upper() not in written
    assert token not in gateway.log.getvalue().decode()
    assert "desk-7" not in written


async def test_the_access_log_can_be_turned_off(make_gateway: MakeGateway) -> None:
    async with make_gateway(access_log=False) as gateway:
        await gateway.client.get("/health/live")
    assert [line for line in gateway.log_lines() if line["event"] == "request"] == []


@pytest.mark.parametrize("n_requests", [50])
async def test_ids_differ(gateway: GatewayUnderTest, n_requests: int) -> None:
    responses = [await gateway.client.get("/health/live") for _ in range(n_requests)]
    assert len({response.headers["x-request-id"] for response in responses}) == n_requests
