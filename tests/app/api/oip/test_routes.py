"""The protocol's routes as any HTTP client sees them: who may ask, what is told, how it is refused."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from app.backends.fake import FakeBackend, fake_prediction
from serve_app.contract import ERRORS_BY_CODE, NotReady, Options
from tests.app.under_test import GatewayUnderTest, MakeGateway, some_windows

MARK = "qx-marks-the-echo"
INFER = "/v2/models/cnn_lstm/infer"

# Every route below /v2, with names that exist.
ROUTES = [
    ("GET", "/v2"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/cnn_lstm"),
    ("GET", "/v2/models/cnn_lstm/ready"),
    ("GET", "/v2/models/cnn_lstm/stats"),
    ("GET", "/v2/models/cnn_lstm/versions/1"),
    ("GET", "/v2/models/cnn_lstm/versions/1/ready"),
    ("GET", "/v2/models/cnn_lstm/versions/1/stats"),
    ("POST", INFER),
    ("POST", "/v2/models/cnn_lstm/versions/1/infer"),
]


def question(windows: np.ndarray | None = None, **changes: Any) -> dict[str, Any]:
    """An inference request in JSON."""
    windows = some_windows(1) if windows is None else windows
    data = windows.astype(float).ravel().tolist()
    tensor = {"name": "windows", "datatype": "FP32", "shape": list(windows.shape), "data": data}
    return {"inputs": [tensor], **changes}


async def infer(
    gateway: GatewayUnderTest, body: bytes | dict[str, Any], path: str = INFER, **headers: str
) -> httpx.Response:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    fixed = {"Content-Type": "application/json", **gateway.bearer()}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await gateway.client.post(path, content=content, headers={**fixed, **named})


def assert_refused(response: httpx.Response, status: int) -> str:
    """The answer is an error of the protocol and says nothing that the caller said; returns its sentence."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    assert len(response.content) <= 4096
    assert MARK not in response.text
    assert response.headers["x-request-id"]
    sentence: str = document["error"]
    assert sentence
    return sentence


# --- who asks


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_but_health_needs_the_scope_predict(
    gateway: GatewayUnderTest, method: str, path: str
) -> None:
    body = orjson.dumps(question()) if method == "POST" else None
    without = await gateway.client.request(method, path, content=body)
    assert_refused(without, 401)
    assert without.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    other = await gateway.client.request(method, path, content=body, headers=gateway.bearer("ops admin features"))
    assert_refused(other, 403)
    assert other.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="predict"'
    assert gateway.calls() == []
    right = await gateway.client.request(method, path, content=body, headers=gateway.bearer("predict"))
    assert right.status_code == 200, right.text


@pytest.mark.parametrize(("path", "member"), [("/v2/health/live", "live"), ("/v2/health/ready", "ready")])
async def test_health_needs_no_token(gateway: GatewayUnderTest, path: str, member: str) -> None:
    response = await gateway.client.get(path)
    assert (response.status_code, response.json()) == (200, {member: True})


async def test_a_stranger_learns_nothing_of_models(gateway: GatewayUnderTest) -> None:
    for path in ("/v2/models/other", "/v2/models/cnn_lstm/versions/99", "/v2/models/other/infer"):
        assert_refused(await gateway.client.request("POST" if "infer" in path else "GET", path), 401)


# --- what is told


async def test_not_ready_is_503_with_retry_after(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.ready = gateway.legacy.ready = False
    for path in ("/v2/health/ready", "/v2/models/cnn_lstm/ready", "/v2/models/cnn_lstm/versions/1/ready"):
        response = await gateway.client.get(path, headers=gateway.bearer())
        assert_refused(response, 503)
        assert response.headers["retry-after"] == "5"
    assert (await gateway.client.get("/v2/health/live")).status_code == 200


async def test_the_server_names_its_extensions(gateway: GatewayUnderTest) -> None:
    document = (await gateway.client.get("/v2", headers=gateway.bearer())).json()
    assert document["extensions"] == ["binary_tensor_data", "parameters", "statistics"]
    assert document["version"]


async def test_metadata_name_the_versions_that_are_served_now(make_gateway: MakeGateway) -> None:
    backends = [FakeBackend("ray_serve", version="2"), FakeBackend("legacy", version="1")]
    async with make_gateway(backends=backends) as gateway:
        document = (await gateway.client.get("/v2/models/cnn_lstm", headers=gateway.bearer())).json()
        assert document["versions"] == ["1", "2"]
        assert document["outputs"][0] == {"name": "classification_probs", "datatype": "FP32", "shape": [-1, 3]}
        backends[0].ready = False
        document = (await gateway.client.get("/v2/models/cnn_lstm", headers=gateway.bearer())).json()
        assert document["versions"] == ["1"]


async def test_the_name_of_the_model_is_a_setting(make_gateway: MakeGateway) -> None:
    async with make_gateway(model="alpha") as gateway:
        response = await infer(gateway, question(), "/v2/models/alpha/infer")
        assert response.json()["model_name"] == "alpha"
        assert_refused(await infer(gateway, question(), INFER), 404)


async def test_statistics_of_a_version_without_requests_are_zero(gateway: GatewayUnderTest) -> None:
    response = await gateway.client.get("/v2/models/cnn_lstm/versions/1/stats", headers=gateway.bearer())
    (row,) = response.json()["model_stats"]
    assert (row["version"], row["inference_count"], row["execution_count"]) == ("1", 0, 0)
    assert row["batch_stats"] == []


async def test_native_requests_count_too_and_refused_ones_do_not(gateway: GatewayUnderTest) -> None:
    await gateway.predict(some_windows(3))
    await infer(gateway, question(some_windows(2)))
    await infer(gateway, b"{")
    response = await gateway.client.get("/v2/models/stats", headers=gateway.bearer())
    (row,) = response.json()["model_stats"]
    assert row["inference_count"] == 5
    assert row["inference_stats"]["fail"] == {"count": 0, "ns": 0}


async def test_openapi_shows_the_routes_whole(gateway: GatewayUnderTest) -> None:
    paths = (await gateway.client.get("/openapi.json")).json()["paths"]
    operation = paths["/v2/models/{model}/versions/{version}/infer"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "application/octet-stream"}
    assert {parameter["name"].lower() for parameter in operation["parameters"]} == {
        "model",
        "version",
        "inference-header-content-length",
        "x-request-timeout-ms",
        "x-request-id",
        "x-route-to",
        "x-route-key",
        "x-symbol",
    }
    below = {path: item for path, item in paths.items() if path.startswith("/v2")}
    assert len(below) == len(ROUTES) + 2
    for item in below.values():
        for operation in item.values():
            assert operation["tags"] == ["open-inference-protocol"]
            assert "422" not in operation["responses"]


async def test_metrics_and_logs_name_templates_and_never_paths(gateway: GatewayUnderTest) -> None:
    await infer(gateway, question())
    await infer(gateway, question(), "/v2/models/cnn_lstm/versions/1/infer")
    await infer(gateway, question(), f"/v2/models/{MARK}/infer")
    text = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    for handler, status in (
        ("/v2/models/{model}/infer", 200),
        ("/v2/models/{model}/infer", 404),
        ("/v2/models/{model}/versions/{version}/infer", 200),
    ):
        assert f'http_requests_total{{handler="{handler}",method="POST",status="{status}"}} 1.0' in text
    assert MARK not in text


# --- which version


@pytest.mark.parametrize("path", ["", "/ready", "/stats", "/infer"])
async def test_a_version_that_nobody_serves_is_404(gateway: GatewayUnderTest, path: str) -> None:
    for names in ("cnn_lstm/versions/99", f"cnn_lstm/versions/{MARK}", f"{MARK}/versions/1"):
        method = "POST" if path == "/infer" else "GET"
        body = orjson.dumps(question()) if path == "/infer" else None
        response = await gateway.client.request(
            method, f"/v2/models/{names}{path}", content=body, headers=gateway.bearer()
        )
        assert_refused(response, 404)
    assert gateway.calls() == []


async def test_the_arm_that_serves_the_version_answers(make_gateway: MakeGateway) -> None:
    backends = [FakeBackend("ray_serve", version="2"), FakeBackend("legacy", version="1")]
    async with make_gateway(backends=backends) as gateway:
        for version, arm in (("1", "legacy"), ("2", "ray_serve")):
            response = await infer(gateway, question(), f"/v2/models/cnn_lstm/versions/{version}/infer")
            assert response.json()["model_version"] == version
            assert response.headers["x-served-by"] == arm
        backends[0].error = NotReady("away")
        failed = await infer(gateway, question(), "/v2/models/cnn_lstm/versions/2/infer")
        assert_refused(failed, 503)


@pytest.mark.parametrize(
    "path", ["/v2/", "/v2/nope", "/v2/models", f"/v2/models/cnn_lstm/{MARK}", "/v2/models/cnn_lstm/versions/1/x"]
)
async def test_unknown_paths_are_404_in_the_protocol_s_form(gateway: GatewayUnderTest, path: str) -> None:
    assert_refused(await gateway.client.get(path, headers=gateway.bearer()), 404)


@pytest.mark.parametrize("path", [INFER, "/v2/models/cnn_lstm/versions/1/infer", "/v2/models/cnn_lstm"])
async def test_other_methods_are_405(gateway: GatewayUnderTest, path: str) -> None:
    response = await gateway.client.request("DELETE", path, headers=gateway.bearer())
    assert_refused(response, 405)
    assert response.headers["allow"] == ("POST" if path.endswith("infer") else "GET")


# --- inference


async def test_json_in_json_out(gateway: GatewayUnderTest) -> None:
    windows = some_windows(2)
    response = await infer(gateway, question(windows, id="a-1"), X_Request_Id="order-17")
    assert response.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in response.headers
    expected = fake_prediction(2)
    document = response.json()
    assert list(document) == ["model_name", "outputs", "model_version", "id"]
    assert document["id"] == "a-1"
    probs = document["outputs"][0]
    assert {name: probs[name] for name in ("name", "datatype", "shape")} == {
        "name": "classification_probs",
        "datatype": "FP32",
        "shape": [2, 3],
    }
    np.testing.assert_array_equal(np.float32(probs["data"]), expected.classification_probs.ravel())
    np.testing.assert_array_equal(gateway.calls()[0].windows, windows)
    assert response.headers["x-request-id"] != "order-17"
    assert response.headers["x-served-by"] == "ray_serve"
    assert "ratelimit" in response.headers
    assert "model;dur=" in response.headers["server-timing"]


async def test_bytes_alone_are_answered_with_bytes(gateway: GatewayUnderTest) -> None:
    windows = some_windows(3)
    response = await infer(gateway, windows.tobytes(), Inference_Header_Content_Length="0")
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(gateway.calls()[0].windows, windows)
    assert response.headers["content-type"] == "application/octet-stream"
    header = int(response.headers["inference-header-content-length"])
    outputs = orjson.loads(response.content[:header])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in outputs]
    assert sizes == [36, 12, 12, 12]
    assert len(response.content) == header + sum(sizes)
    np.testing.assert_array_equal(
        np.frombuffer(response.content, "<f4", 9, header), fake_prediction(3).classification_probs.ravel()
    )


async def test_a_type_is_not_needed_and_another_one_is_415(gateway: GatewayUnderTest) -> None:
    body = orjson.dumps(question())
    assert (await gateway.client.post(INFER, content=body, headers=gateway.bearer())).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", f"application/{MARK}"):
        assert_refused(await infer(gateway, body, Content_Type=kind), 415)


@pytest.mark.parametrize("code", sorted(ERRORS_BY_CODE))
async def test_failures_of_the_model_keep_their_status(gateway: GatewayUnderTest, code: str) -> None:
    gateway.ray_serve.error = gateway.legacy.error = ERRORS_BY_CODE[code](MARK if code != "invalid-windows" else "no")
    native = await gateway.predict()
    response = await infer(gateway, question())
    status = 400 if native.status_code == 422 else native.status_code
    assert response.status_code == status
    assert ("retry-after" in response.headers) == ("retry-after" in native.headers)


async def test_the_quota_is_shared_with_the_native_route(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=2) as gateway:
        assert (await infer(gateway, question(some_windows(2)))).status_code == 200
        response = await infer(gateway, question())
        assert_refused(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        assert (await gateway.predict()).status_code == 429


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1 2", "", "0x10", "9" * 30, "١٢"])
async def test_a_header_length_that_is_none_is_400(gateway: GatewayUnderTest, value: str) -> None:
    headers = {**gateway.bearer(), "Inference-Header-Content-Length": value.encode()}
    response = await gateway.client.post(INFER, content=orjson.dumps(question()), headers=headers)  # type: ignore[arg-type]
    assert_refused(response, 400)


async def test_a_refused_body_spends_no_quota(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=1) as gateway:
        for body in (b"{", b"[]", orjson.dumps({"inputs": []})):
            assert_refused(await infer(gateway, body), 400)
        assert (await infer(gateway, question())).status_code == 200


# --- compression


def compressed(body: bytes, coding: str) -> bytes:
    return gzip.compress(body) if coding == "gzip" else zlib.compress(body)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("damage", ["cut", "longer", "other"])
async def test_a_damaged_body_is_400(gateway: GatewayUnderTest, coding: str, damage: str) -> None:
    whole = compressed(orjson.dumps(question()), coding)
    body = {"cut": whole[:-5], "longer": whole + b"more", "other": b"\0" + whole}[damage]
    assert_refused(await infer(gateway, body, Content_Encoding=coding), 400)
    assert gateway.calls() == []


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "x-gzip", "gzip, gzip", "gzip, deflate", MARK])
async def test_other_codings_are_415_with_those_that_are_taken(gateway: GatewayUnderTest, coding: str) -> None:
    response = await infer(gateway, question(), Content_Encoding=coding)
    assert_refused(response, 415)
    assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_bomb_is_413(make_gateway: MakeGateway, coding: str) -> None:
    async with make_gateway(max_body_bytes=50_000) as gateway:
        bomb = compressed(b" " * 10_000_000, coding)
        assert len(bomb) < 50_000
        assert_refused(await infer(gateway, bomb, Content_Encoding=coding), 413)


async def test_the_cap_counts_the_inflated_body(make_gateway: MakeGateway) -> None:
    body = b"\0" * 24_000
    async with make_gateway(max_body_bytes=24_000) as gateway:
        headers = {"Content_Encoding": "gzip", "Inference_Header_Content_Length": "0"}
        assert (await infer(gateway, gzip.compress(body), **headers)).status_code == 200
        assert_refused(await infer(gateway, gzip.compress(body + b"\0"), **headers), 413)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZIP", "gzip"),
        ("gzip, deflate", None),
        ("gzip, deflate, br", None),
        ("identity", None),
        ("br", None),
        (MARK, None),
    ],
)
async def test_answers_are_compressed_for_whoever_names_one_coding(
    gateway: GatewayUnderTest, accepted: str, coding: str | None
) -> None:
    response = await infer(gateway, question(), Accept_Encoding=accepted)
    assert response.headers.get("content-encoding") == coding
    assert response.json()["model_name"] == "cnn_lstm"  # httpx undoes it


async def test_refusals_are_never_compressed(gateway: GatewayUnderTest) -> None:
    response = await infer(gateway, b"{", Accept_Encoding="gzip")
    assert_refused(response, 400)
    assert "content-encoding" not in response.headers


# --- options


async def test_only_what_the_outputs_need_is_asked_of_the_model(gateway: GatewayUnderTest) -> None:
    asked = {
        ("classification_probs",): Options(return_uncertainty=False),
        ("epistemic",): Options(),
        ("features",): Options(return_uncertainty=False, return_features=True),
    }
    for names in asked:
        await infer(gateway, question(outputs=[{"name": name} for name in names]))
    assert [call.options for call in gateway.calls()] == list(asked.values())


async def test_our_own_parameters_are_the_native_route_s_flags(gateway: GatewayUnderTest) -> None:
    parameters = {"use_ensemble": False, "return_uncertainty": False, "priority": 3, "desk": MARK}
    response = await infer(gateway, question(parameters=parameters))
    assert [output["name"] for output in response.json()["outputs"]] == ["classification_probs", "regression_pred"]
    assert gateway.calls()[0].options == Options(return_uncertainty=False, use_ensemble=False)
    assert MARK not in response.text


async def test_the_shorter_of_two_deadlines_counts(gateway: GatewayUnderTest) -> None:
    await infer(gateway, question(parameters={"timeout": 10_000_000}), X_Request_Timeout_Ms="300")
    await infer(gateway, question(parameters={"timeout": 300_000}), X_Request_Timeout_Ms="2000")
    response = await infer(gateway, question(parameters={"timeout": 0}))
    assert response.status_code == 200
    first, second, third = gateway.calls()
    assert third.deadline - first.deadline > 0.5
    assert third.deadline - second.deadline > 0.5
