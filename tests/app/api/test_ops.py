from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest

from app.api import docs
from app.backends.fake import FakeBackend
from app.errors import PROBLEM_JSON
from app.observability.metrics import LATENCY_BUCKETS_S
from serve_app.contract import ModelFailed, NotReady, Overloaded
from tests.app.api.routes import routes_of
from tests.app.under_test import GatewayUnderTest, MakeGateway, some_windows


async def test_openapi_lists_the_routes_that_are_served(gateway: GatewayUnderTest) -> None:
    paths = (await gateway.client.get("/openapi.json")).json()["paths"]
    documented = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert documented == {(m, p) for m, p in routes_of(gateway) if p not in docs.PATHS}


async def test_the_docs_page_loads_nothing_from_elsewhere(gateway: GatewayUnderTest) -> None:
    page = (await gateway.client.get("/docs")).text
    linked = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(linked) == 3
    for path in linked:
        response = await gateway.client.get(path)
        assert response.status_code == 200, path
        assert len(response.content) > 1000, path


async def test_pages_can_be_turned_off(make_gateway: MakeGateway) -> None:
    async with make_gateway(docs=False) as gateway:
        for path in (*docs.PATHS, "/redoc"):
            assert (await gateway.client.get(path)).status_code == 404


@pytest.mark.parametrize(
    "path", ["/nope", "/health/", "/admin", "/.env", "/rollout/x", "/metrics/", "//metrics", "/Stats"]
)
async def test_unknown_routes_are_404_problems(gateway: GatewayUnderTest, path: str) -> None:
    response = await gateway.client.get("http://gateway" + path)
    assert response.status_code == 404
    assert response.headers["content-type"] == PROBLEM_JSON
    assert path.strip("/") not in response.json()["detail"].split()


async def test_the_host_header_does_not_choose_the_route(gateway: GatewayUnderTest) -> None:
    response = await gateway.client.get("/stats", headers={"Host": "a/../health?"})
    assert response.status_code == 401


async def until_probed(gateway: GatewayUnderTest) -> dict[str, Any]:
    """The health report once every arm was asked."""
    while True:
        report = (await gateway.client.get("/health")).json()
        if report["last_check"] is not None and all(arm["last_check"] for arm in report["arms"]):
            return report
        await asyncio.sleep(0)


async def test_health_shows_the_documented_fields_and_a_row_per_arm(gateway: GatewayUnderTest) -> None:
    report = await until_probed(gateway)
    assert {"status", "latency_ms", "last_check", "is_healthy", "arms"} <= report.keys()
    assert report["status"] == "healthy"
    assert report["is_healthy"] is True
    assert [arm["arm"] for arm in report["arms"]] == ["ray_serve", "legacy"]


async def test_health_is_503_when_no_arm_answers(make_gateway: MakeGateway) -> None:
    broken = FakeBackend("legacy")
    broken.error = ModelFailed("weights of /srv/models/secret are bad")
    async with make_gateway(backends=[broken]) as gateway:
        report = await until_probed(gateway)
        response = await gateway.client.get("/health")
        assert response.status_code == 503
        assert report["status"] == "unhealthy"
        assert report["is_healthy"] is False
        assert report["error"] == "model-failed"
        assert "secret" not in response.text


async def test_liveness_asks_nothing_but_the_process(make_gateway: MakeGateway) -> None:
    gone = FakeBackend("ray_serve")
    gone.ready = False
    async with make_gateway(backends=[gone]) as gateway:
        assert (await gateway.client.get("/health/live")).status_code == 200
        assert (await gateway.client.get("/health/ready")).status_code == 503


async def test_one_arm_is_enough_to_be_ready(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.ready = False
    response = await gateway.client.get("/health/ready")
    assert response.status_code == 200
    assert {arm["arm"]: arm["reason"] for arm in response.json()["arms"]} == {"ray_serve": "not-ready", "legacy": "ok"}
    gateway.legacy.ready = False
    response = await gateway.client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["status"] == "not-ready"
    assert "retry-after" in response.headers


async def test_stats_count_answers_refusals_and_fallbacks(gateway: GatewayUnderTest) -> None:
    await gateway.predict(some_windows(3))
    await gateway.predict(body=b"x")
    gateway.ray_serve.error = NotReady()
    await gateway.predict()
    stats = (await gateway.client.get("/stats", headers=gateway.bearer("ops"))).json()
    assert stats["predictions"] == 2
    assert stats["windows"] == {"ray_serve": 3, "legacy": 1}
    assert stats["refusals"] == {"invalid-input": 1}
    assert stats["fallbacks"] == {"not-ready": 1}
    assert stats["rollout"]["ray_serve_fraction"] == 1.0
    assert set(stats["backends"]) == {"ray_serve", "legacy"}


async def test_ray_serve_stats_are_the_backend_s(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.replicas = [{"replica": "a"}]
    stats = (await gateway.client.get("/ray-serve/stats", headers=gateway.bearer("ops"))).json()
    assert stats["replicas"] == [{"replica": "a"}]


async def test_ray_serve_stats_are_404_without_ray_serve(make_gateway: MakeGateway) -> None:
    async with make_gateway(backends=[FakeBackend("legacy")]) as gateway:
        response = await gateway.client.get("/ray-serve/stats", headers=gateway.bearer("ops"))
        assert response.status_code == 404
        assert response.headers["content-type"] == PROBLEM_JSON


async def scrape(gateway: GatewayUnderTest) -> dict[str, float]:
    text = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


async def test_the_documented_metrics_are_there_with_their_buckets(gateway: GatewayUnderTest) -> None:
    refused = {"model": "cnn_lstm", "version": "9", "reason": "damaged"}
    gateway.ray_serve.replicas = [{"gpu_id": "0", "gpu_utilization_percent": 41.5}, {"rejected": refused}]
    await gateway.predict()
    await gateway.predict(body=b"x")
    samples = await scrape(gateway)
    assert samples['cnn_lstm_prediction_requests_total{model_version="1"}'] == 1
    assert samples['cnn_lstm_prediction_latency_seconds_count{model_version="1"}'] == 1
    assert samples['cnn_lstm_prediction_errors_total{error_type="invalid-input",model_version="none"}'] == 1
    assert samples['cnn_lstm_gpu_utilization_percent{gpu_id="0"}'] == 41.5
    assert samples["cnn_lstm_replicas_total"] == 2
    assert samples["cnn_lstm_replicas_rejecting"] == 1
    bounds = {name.split('le="')[1].split('"')[0] for name in samples if "latency_seconds_bucket" in name}
    assert {float(bound) for bound in bounds} == {*LATENCY_BUCKETS_S, float("inf")}
    assert samples['gateway_stage_seconds_count{stage="model"}'] == 1


async def test_metrics_count_routes_and_never_paths(gateway: GatewayUnderTest) -> None:
    await gateway.predict()
    for i in range(20):
        await gateway.client.get(f"/made-up-{i}")
        await gateway.client.request(f"MADEUP{i}", "/health/live")
    samples = await scrape(gateway)
    assert samples['http_requests_total{handler="/ray-serve/predict",method="POST",status="200"}'] == 1
    assert samples['http_requests_total{handler="none",method="GET",status="404"}'] == 20
    assert samples['http_requests_total{handler="/health/live",method="other",status="405"}'] == 20
    assert not [name for name in samples if "made-up" in name or "MADEUP" in name]


async def test_hostile_requests_add_no_series_without_bound(gateway: GatewayUnderTest) -> None:
    async def provoke(i: int) -> None:
        await gateway.predict(headers={"X-Request-Id": f"id-{i}", "X-Request-Timeout-Ms": f"{i}x"})
        await gateway.predict(query=f"?p{i}=1", subject=f"subject-{i}")
        await gateway.client.get(f"/models/m{i}")

    await provoke(0)
    await scrape(gateway)  # the scrape counts itself, from the next one on
    before = set(await scrape(gateway))
    for i in range(1, 50):
        await provoke(i)
    assert set(await scrape(gateway)) == before


async def test_metrics_may_be_public_by_setting(make_gateway: MakeGateway) -> None:
    async with make_gateway(metrics_public=True) as gateway:
        assert (await gateway.client.get("/metrics")).status_code == 200


async def test_a_scrape_does_not_wait_for_a_ray_that_hangs(make_gateway: MakeGateway) -> None:
    class Hanging(FakeBackend):
        async def stats(self) -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

    async with make_gateway(backends=[Hanging()]) as gateway:
        before = time.monotonic()
        response = await gateway.client.get("/metrics", headers=gateway.bearer("ops"))
        assert response.status_code == 200
        assert time.monotonic() - before < 3


async def test_shedding_is_counted_by_kind(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.error = Overloaded()
    await gateway.predict()
    samples = await scrape(gateway)
    name = 'cnn_lstm_prediction_errors_total{error_type="temporary-reduced-capacity",model_version="none"}'
    assert samples[name] == 1


async def test_scrapes_together_ask_the_replicas_once(make_gateway: MakeGateway) -> None:
    class Counting(FakeBackend):
        asked = 0

        async def stats(self) -> dict[str, Any]:
            self.asked += 1
            await asyncio.sleep(0.01)
            return await super().stats()

    backend = Counting()
    async with make_gateway(backends=[backend], metrics_public=True) as gateway:
        await asyncio.gather(*(gateway.client.get("/metrics") for _ in range(50)))
        assert backend.asked == 1


async def test_names_methods_and_paths_that_callers_make_up_add_no_series(gateway: GatewayUnderTest) -> None:
    async def provoke(i: int) -> None:
        await gateway.client.get(f"/v2/models/model-{i}", headers=bearer)
        await gateway.client.post(f"/v2/models/model-{i}/versions/{i}/infer", headers=bearer)
        await gateway.client.request(f"METHOD{i}", f"/path-{i}")

    bearer = gateway.bearer()
    await provoke(0)
    await scrape(gateway)
    before = set(await scrape(gateway))
    for i in range(1, 100):
        await provoke(i)
    assert set(await scrape(gateway)) == before


# Where strangers look first.
KNOWN_PATHS = (
    *(
        "/admin",
        "/.env",
        "/.git/config",
        "/actuator/env",
        "/api",
        "/api/jobs/",
        "/api/version",
        "/console",
        "/debug/pprof/",
    ),
    *("/etc/passwd", "/graphql", "/info", "/login", "/metrics", "/openapi.json", "/docs", "/redoc", "/phpinfo.php"),
    *("/ray-serve/stats", "/robots.txt", "/rollout", "/server-status", "/stats", "/swagger.json", "/v1/models"),
    *(
        "/v2",
        "/v2/models/cnn_lstm",
        "/v2/models/stats",
        "/v2/repository/index",
        "/wp-login.php",
        "/-/healthz",
        "/-/routes",
    ),
)


@pytest.mark.parametrize("path", KNOWN_PATHS)
async def test_a_stranger_finds_nothing_where_others_keep_it(make_gateway: MakeGateway, path: str) -> None:
    async with make_gateway(docs=False) as gateway:
        response = await gateway.client.get(path)
        assert response.status_code in {401, 404}
        assert len(response.content) < 512


async def test_the_event_loop_s_lag_is_measured(gateway: GatewayUnderTest) -> None:
    while not (await scrape(gateway))["gateway_event_loop_lag_seconds_count"]:
        await asyncio.sleep(0.02)
