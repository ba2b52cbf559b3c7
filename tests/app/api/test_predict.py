from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from app.errors import PROBLEM_JSON
from app.rollout.choice import hash_principal
from serve_app.contract import (
    ERRORS_BY_CODE,
    MAX_ABS_VALUE,
    DeadlineExceeded,
    ModelOutputInvalid,
    NotReady,
    Options,
    Overloaded,
)
from tests.app.under_test import GatewayUnderTest, MakeGateway, client_calls, some_windows

MARK = "qx-marks-the-echo"


def data(n_windows: int = 1) -> list[Any]:
    return some_windows(n_windows).astype(float).tolist()


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is a whole problem document, and says nothing that the caller said."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"].endswith((":" + code, "#" + code)), problem["type"]
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == response.headers["x-request-id"]
    assert len(response.content) <= 4096
    assert MARK not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    return problem


# --- answers


async def test_a_raw_window_is_answered_in_the_documented_form(gateway: GatewayUnderTest) -> None:
    response = await gateway.predict(some_windows(2), headers={"X-Request-Id": "order-17"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == [
        "predictions",
        "uncertainty",
        "processing_time_ms",
        "model_time_ms",
        "model_name",
        "model_version",
        "backend",
        "request_id",
        "client_request_id",
    ]
    assert list(answer["predictions"]) == ["classification_probs", "regression_pred", "ensemble_weights"]
    assert np.shape(answer["predictions"]["classification_probs"]) == (2, 3)
    assert np.shape(answer["predictions"]["regression_pred"]) == (2,)
    assert np.shape(answer["predictions"]["ensemble_weights"]) == (2, 3)
    assert {name: np.shape(values) for name, values in answer["uncertainty"].items()} == dict.fromkeys(
        ["regression_uncertainty", "aleatoric", "epistemic", "predictive_entropy"], (2,)
    )
    assert answer["backend"] == response.headers["x-served-by"] == "ray_serve"
    assert answer["request_id"] == response.headers["x-request-id"]
    assert answer["client_request_id"] == "order-17"
    assert answer["model_version"] == "1"
    assert answer["processing_time_ms"] > 0


async def test_json_and_raw_windows_reach_the_model_alike(gateway: GatewayUnderTest) -> None:
    windows = some_windows(3)
    await gateway.predict(windows)
    await gateway.predict_json({"data": windows.astype(float).tolist()})
    for call in gateway.calls():
        assert call.windows.dtype == np.float32
        assert call.windows.flags.c_contiguous
        np.testing.assert_array_equal(call.windows, windows)


async def test_one_window_may_come_without_a_batch_axis(gateway: GatewayUnderTest) -> None:
    response = await gateway.predict_json({"data": data(1)[0]})
    assert np.shape(response.json()["predictions"]["classification_probs"]) == (1, 3)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"return_uncertainty": False},
        {"use_ensemble": False},
        {"return_features": True},
        {"return_uncertainty": True, "use_ensemble": False, "return_features": True},
    ],
)
async def test_flags_mean_the_same_in_the_body_and_in_the_query(
    gateway: GatewayUnderTest, flags: dict[str, bool]
) -> None:
    from_body = (await gateway.predict_json({"data": data(), **flags})).json()
    query = "&".join(f"{name}={str(value).lower()}" for name, value in flags.items())
    from_query = (await gateway.predict(some_windows(1), query=f"?{query}" if query else "")).json()
    assert [call.options for call in gateway.calls()] == [Options(**flags)] * 2
    assert from_body["predictions"] == from_query["predictions"]
    assert from_body["uncertainty"] == from_query["uncertainty"]
    assert (from_body["uncertainty"] is None) == (not flags.get("return_uncertainty", True))
    assert (from_body["predictions"]["ensemble_weights"] is None) == (not flags.get("use_ensemble", True))
    assert ("features" in from_body["predictions"]) == flags.get("return_features", False)


async def test_the_call_carries_deadline_trace_and_a_hashed_principal(gateway: GatewayUnderTest) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = await gateway.predict(headers={"traceparent": trace, "X-Request-Timeout-Ms": "500"})
    (call,) = gateway.calls()
    assert call.trace == trace
    assert call.request_id == response.headers["x-request-id"]
    assert len(call.principal) == 16
    assert "desk" not in call.principal
    now = asyncio.get_running_loop().time()
    assert now < call.deadline < now + 0.5


async def test_stages_add_up_to_the_total(gateway: GatewayUnderTest) -> None:
    response = await gateway.predict()
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(stages) == ["auth", "decode", "limit", "queue", "transport", "batch", "model", "encode", "total"]
    total = float(stages.pop("total"))
    assert sum(map(float, stages.values())) == pytest.approx(total, rel=0.2)


async def test_a_failure_of_ray_serve_is_answered_by_legacy_and_said(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.error = NotReady("no replica")
    response = await gateway.predict()
    assert response.status_code == 200
    assert response.headers["x-served-by"] == response.json()["backend"] == "legacy"
    assert response.headers["x-fallback"] == "not-ready"


# --- who asks


async def test_no_token_is_401_before_the_body_is_read(gateway: GatewayUnderTest) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read for a stranger")
        yield b""

    response = await gateway.client.post("/ray-serve/predict", content=body())
    problem = assert_problem(response, 401, "invalid-token")
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert problem["detail"] == "send a valid token: Authorization: Bearer TOKEN"


@pytest.mark.parametrize(
    "value", ["", "Bearer", f"Bearer {MARK}", "Basic ZGVzazpwYXNz", "Bearer a.b.c", "Bearer " + "a" * 9000]
)
async def test_every_bad_token_gets_the_same_answer(gateway: GatewayUnderTest, value: str) -> None:
    response = await gateway.predict(headers={"Authorization": value})
    problem = assert_problem(response, 401, "invalid-token")
    assert problem["detail"] == "send a valid token: Authorization: Bearer TOKEN"
    assert gateway.calls() == []


async def test_expired_token_is_401_and_spends_no_quota(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=1) as gateway:
        stale = gateway.bearer()
        gateway.wall_clock.advance(3700)
        assert_problem(await gateway.predict(headers=stale), 401, "invalid-token")
        assert (await gateway.predict()).status_code == 200


async def test_two_tokens_are_401(gateway: GatewayUnderTest) -> None:
    token = gateway.token()
    headers = [("Authorization", f"Bearer {token}")] * 2
    response = await gateway.client.post("/ray-serve/predict", content=b"", headers=headers)
    assert_problem(response, 401, "invalid-token")


@pytest.mark.parametrize("scopes", ["ops", "admin ops", "predictor", "pre"])
async def test_the_scope_predict_is_needed(gateway: GatewayUnderTest, scopes: str) -> None:
    response = await gateway.predict(scopes=scopes)
    assert_problem(response, 403, "insufficient-scope")
    assert response.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="predict"'
    assert gateway.calls() == []


# --- headers


@pytest.mark.parametrize("value", ["0", "2001", "-1", "1.5", "1e3", "", " 5 0", "١٢", "5" * 400, MARK])
async def test_a_bad_timeout_is_400(gateway: GatewayUnderTest, value: str) -> None:
    response = await gateway.predict(headers={"X-Request-Timeout-Ms": value.encode()})  # type: ignore[dict-item]
    assert_problem(response, 400, "bad-request")
    assert gateway.calls() == []


@pytest.mark.parametrize(
    "value", [f"{MARK}/../..", "a b", "x" * 65, "a\tb", "é", "<script>", "gk_ab12cd34_x", "eyJhbGciOi"]
)
async def test_a_strange_request_id_is_not_repeated(gateway: GatewayUnderTest, value: str) -> None:
    response = await gateway.predict(headers={"X-Request-Id": value.encode()})  # type: ignore[dict-item]
    assert response.status_code == 200
    assert response.json()["client_request_id"] is None
    assert response.headers["x-request-id"] != value


async def test_operators_may_choose_the_arm(gateway: GatewayUnderTest) -> None:
    for arm in ("legacy", "ray_serve"):
        response = await gateway.predict(scopes="predict ops", headers={"X-Route-To": arm})
        assert response.headers["x-served-by"] == arm


async def test_others_may_not_choose_the_arm(gateway: GatewayUnderTest) -> None:
    assert_problem(await gateway.predict(headers={"X-Route-To": "legacy"}), 403, "insufficient-scope")
    assert gateway.calls() == []


async def test_an_unknown_arm_is_400(gateway: GatewayUnderTest) -> None:
    response = await gateway.predict(scopes="predict ops", headers={"X-Route-To": MARK})
    assert_problem(response, 400, "bad-request")


async def test_a_chosen_arm_has_no_fallback(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.error = NotReady("no replica")
    response = await gateway.predict(scopes="predict ops", headers={"X-Route-To": "ray_serve"})
    assert_problem(response, 503, "not-ready")


async def test_a_route_key_moves_only_those_who_may_use_one(make_gateway: MakeGateway) -> None:
    async with make_gateway(
        route_key_subjects=frozenset({"broker"}), sticky_key="k" * 32, ray_serve_fraction=0.5
    ) as gateway:
        refused = await gateway.predict(subject="desk-7", headers={"X-Route-Key": "client-1"})
        assert_problem(refused, 403, "insufficient-scope")
        served = set()
        for client in range(20):
            key = f"client-{client}"
            response = await gateway.predict(subject="broker", headers={"X-Route-Key": key})
            served.add(response.headers["x-served-by"])
            in_canary = int(hash_principal(b"k" * 32, key), 16) < 1 << 63
            assert response.headers["x-served-by"] == ("ray_serve" if in_canary else "legacy")
        assert served == {"ray_serve", "legacy"}


async def test_the_right_to_a_route_key_and_what_it_moves_belong_to_one_tenant(make_gateway: MakeGateway) -> None:
    allowed = frozenset({"broker", "fund-a/broker", "fund-b/broker"})
    async with make_gateway(route_key_subjects=allowed, sticky_key="k" * 32, ray_serve_fraction=0.5) as gateway:

        async def arms(tenant: str | None) -> list[str]:
            headers = gateway.bearer("predict", "broker", tenant)
            keys = [f"client-{number}" for number in range(20)]
            answers = [await gateway.predict(headers=headers | {"X-Route-Key": key}) for key in keys]
            return [answer.headers.get("x-served-by", "") for answer in answers]

        assert await arms("fund-c") == [""] * 20
        sides = [await arms(tenant) for tenant in (None, "fund-a", "fund-b")]
        assert all(set(side) == {"ray_serve", "legacy"} for side in sides)
        assert sides[0] != sides[1] != sides[2] != sides[0]
        assert await arms("fund-a") == sides[1]


@pytest.mark.parametrize("name", ["Content-Type", "X-Request-Timeout-Ms", "X-Route-To", "Content-Encoding"])
async def test_a_header_given_twice_is_400(gateway: GatewayUnderTest, name: str) -> None:
    headers = [*gateway.bearer().items(), (name, "1"), (name, "1")]
    response = await gateway.client.post("/ray-serve/predict", content=b"x", headers=headers)
    assert_problem(response, 400, "bad-request")


@pytest.mark.parametrize(
    "headers",
    [
        [("Accept-Encoding", "gzip"), ("Accept-Encoding", "br")],
        [("Traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("Traceparent", f"00-{'c' * 32}-{'d' * 16}-01")],
    ],
)
async def test_headers_that_say_nothing_certain_are_passed_over(
    gateway: GatewayUnderTest, headers: list[tuple[str, str]]
) -> None:
    known = [*gateway.bearer().items(), ("Content-Type", "application/octet-stream")]
    body = some_windows(1).tobytes()
    response = await gateway.client.post("/ray-serve/predict", content=body, headers=[*known, *headers])
    assert response.status_code == 200
    assert response.headers["x-served-by"] == "ray_serve"
    assert gateway.calls()[-1].trace is None


async def test_a_credential_in_a_header_of_almost_that_name_is_none(gateway: GatewayUnderTest) -> None:
    for name in ("Authorization_", "X-Authorization", "Proxy-Authorization"):
        response = await gateway.client.get("/v2", headers={name: gateway.bearer()["Authorization"]})
        assert response.status_code == 401


async def test_more_windows_than_can_ever_wait_are_422(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_body_bytes=32 << 20) as gateway:
        assert_problem(await gateway.predict(some_windows(1025)), 422, "invalid-input")
        assert gateway.calls() == []
        assert (await gateway.predict(some_windows(1024))).status_code == 200


# --- bodies


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("", None),
        ("text/plain", None),
        ("application/x-www-form-urlencoded", None),
        ("multipart/form-data; boundary=x", None),
        ("application/json-patch+json", None),
        ("application/json", "gzip"),
        ("application/octet-stream", "deflate"),
        ("application/json", "gzip, identity"),
        (MARK, MARK),
    ],
)
async def test_other_types_and_encodings_are_415(
    gateway: GatewayUnderTest, content_type: str, encoding: str | None
) -> None:
    headers = {"Content-Type": content_type} | ({"Content-Encoding": encoding} if encoding else {})
    assert_problem(await gateway.predict(body=b"x", headers=headers), 415, "unsupported-body")
    assert gateway.calls() == []


async def test_parameters_of_the_type_do_not_matter(gateway: GatewayUnderTest) -> None:
    response = await gateway.predict_json({"data": data()}, **{"Content-Type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{]",
        f'{{"data": {MARK}}}'.encode(),
        b'{"data": NaN}',
        b'{"data": [[NaN]]}',
        b'{"data": [[Infinity]]}',
        b'{"data": [[-Infinity]]}',
        b'{"data": [[1e999]]}',
        b'{"data": [[1,]]}',
        b'{"data": [[01]]}',
        b"{'data': 1}",
        b'\xef\xbb\xbf{"data": 1}',
        b'{"data": "\xff"}',
        b'{"data": "\\ud800"}',
        '{"data": 1}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"data":' + b"[" * 100_000,
    ],
)
async def test_what_is_no_json_is_400(gateway: GatewayUnderTest, body: bytes) -> None:
    assert_problem(await gateway.predict_json(body), 400, "bad-request")
    assert gateway.calls() == []


async def test_a_field_given_twice_is_400(gateway: GatewayUnderTest) -> None:
    window = json.dumps(data())
    twice = f'{{"data": {window}, "data": {window}}}'
    disguised = f'{{"data": {window}, "\\u0064ata": {window}}}'
    for body in (twice, disguised, f'{{"use_ensemble": true, "data": {window}, "use_ensemble": false}}'):
        assert_problem(await gateway.predict_json(body), 400, "bad-request")
    assert gateway.calls() == []


@pytest.mark.parametrize(
    "document",
    [
        [],
        [1, 2],
        [MARK],
        None,
        1,
        {},
        {"return_features": True},
        {"data": data(), MARK: 1},
        {"data": data(), "use_ensemble": 1},
        {"data": data(), "use_ensemble": "true"},
        {"data": data(), "return_features": None},
    ],
)
async def test_wrong_fields_are_422(gateway: GatewayUnderTest, document: Any) -> None:
    assert_problem(await gateway.predict_json(document), 422, "invalid-input")
    assert gateway.calls() == []


def replaced(path: tuple[int, ...], value: Any) -> Any:
    """Valid data of two windows with one node replaced."""
    changed = data(2)
    node = changed
    for index in path[:-1]:
        node = node[index]
    node[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((1, 3, 17), value) for value in (True, False, None, "1.5", "NaN", MARK, [], [1.0], {}, {"a": 1})),
        *(((1, 3), value) for value in (None, 1.0, MARK, "x" * 60, {}, {str(i): i for i in range(60)}, [], [1.0] * 59)),
        *(
            ((1,), value)
            for value in (None, 1.0, MARK, "x" * 50, {}, {str(i): i for i in range(50)}, [], data()[0][:49])
        ),
        ((0,), None),
        ((0,), MARK),
        ((0, 0), True),
        ((0, 0, 0), True),
        ((1, 49, 59), False),
    ],
)
async def test_what_is_no_number_is_422_with_its_place(
    gateway: GatewayUnderTest, path: tuple[int, ...], value: Any
) -> None:
    problem = assert_problem(await gateway.predict_json({"data": replaced(path, value)}), 422, "invalid-input")
    assert problem["pointer"].startswith("/data")
    if path[0] == 1:
        assert problem["pointer"].startswith("/data/" + "/".join(map(str, path)))
    assert gateway.calls() == []


@pytest.mark.parametrize("value", [None, True, 1.5, MARK, {}, {"a": [1]}, [], [[]], [[[]]], [[[[1.0]]]], [1.0] * 3000])
async def test_data_of_another_kind_are_422(gateway: GatewayUnderTest, value: Any) -> None:
    response = await gateway.predict_json({"data": value})
    assert response.status_code == 422, response.text
    assert MARK not in response.text
    assert gateway.calls() == []


@pytest.mark.parametrize(
    "shape", [(60, 50), (50, 59), (51, 60), (1, 60, 50), (2, 50, 61), (1, 1, 50, 60), (3000,), (0, 50, 60)]
)
async def test_other_shapes_are_422(gateway: GatewayUnderTest, shape: tuple[int, ...]) -> None:
    response = await gateway.predict_json({"data": np.zeros(shape).tolist()})
    assert response.status_code == 422
    assert response.headers["content-type"] == PROBLEM_JSON
    assert gateway.calls() == []


@pytest.mark.parametrize("value", [1e300, -1e300, 1e39, 2 * MAX_ABS_VALUE, 10**30, -(10**18)])
async def test_numbers_beyond_all_bounds_are_422(gateway: GatewayUnderTest, value: float) -> None:
    assert_problem(await gateway.predict_json({"data": replaced((1, 3, 17), value)}), 422, "invalid-windows")
    assert gateway.calls() == []


@pytest.mark.parametrize("value", [0, 1, -5, 1e-300, -0.0, 1e5, 123456])
async def test_unusual_but_good_numbers_are_taken(gateway: GatewayUnderTest, value: float) -> None:
    response = await gateway.predict_json({"data": replaced((1, 3, 17), value)})
    assert response.status_code == 200
    assert gateway.calls()[0].windows[1, 3, 17] == np.float32(value)


@pytest.mark.parametrize("size", [1, 4, 11_999, 12_001, 12_004])
async def test_half_windows_are_422(gateway: GatewayUnderTest, size: int) -> None:
    assert_problem(await gateway.predict(body=b"\0" * size), 422, "invalid-input")
    assert gateway.calls() == []


async def test_an_empty_raw_body_is_422(gateway: GatewayUnderTest) -> None:
    headers = {"Content-Type": "application/octet-stream", **gateway.bearer()}
    response = await gateway.client.post("/ray-serve/predict", content=b"", headers=headers)
    assert_problem(response, 422, "invalid-input")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
async def test_a_poisoned_window_is_refused_alone(gateway: GatewayUnderTest, poison: float) -> None:
    bad = some_windows(1)
    bad[0, 49, 59] = poison
    responses = await asyncio.gather(*(gateway.predict(bad if i == 3 else some_windows(1, i)) for i in range(8)))
    assert [response.status_code for response in responses] == [200] * 3 + [422] + [200] * 4
    assert len(gateway.calls()) == 7
    assert_problem(responses[3], 422, "invalid-windows")


@pytest.mark.parametrize(
    "query",
    [
        "?return_features=1",
        "?return_features=True",
        "?return_features=",
        "?return_features",
        f"?{MARK}=true",
        "?data=1",
        "?return_features=true&return_features=true",
        "?return_features=true&",
        "?return%5Ffeatures=true",
    ],
)
async def test_a_query_that_is_not_understood_is_400(gateway: GatewayUnderTest, query: str) -> None:
    assert_problem(await gateway.predict(query=query), 400, "bad-request")
    assert gateway.calls() == []


async def test_flags_in_the_query_of_a_json_body_are_400(gateway: GatewayUnderTest) -> None:
    headers = {"Content-Type": "application/json", **gateway.bearer()}
    response = await gateway.client.post(
        "/ray-serve/predict?return_features=true", content=json.dumps({"data": data()}), headers=headers
    )
    assert_problem(response, 400, "bad-request")


# --- size


async def test_an_announced_giant_is_413_unread(gateway: GatewayUnderTest) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(1 << 30), **gateway.bearer()}
    response = await gateway.client.post("/ray-serve/predict", content=body(), headers=headers)
    assert_problem(response, 413, "body-too-large")
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json"])
async def test_a_giant_in_chunks_is_413_at_the_cap(make_gateway: MakeGateway, content_type: str) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    async with make_gateway(max_body_bytes=20_000) as gateway:
        headers = {"Content-Type": content_type, **gateway.bearer()}
        response = await gateway.client.post("/ray-serve/predict", content=body(), headers=headers)
        assert_problem(response, 413, "body-too-large")
        assert sent <= 21_000
        assert gateway.calls() == []


async def test_a_body_at_the_cap_is_taken(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_body_bytes=24_000) as gateway:
        assert (await gateway.predict(some_windows(2))).status_code == 200
        assert_problem(await gateway.predict(some_windows(3)), 413, "body-too-large")


# --- limits


async def test_windows_are_counted_and_a_refusal_counts_nothing(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=20) as gateway:
        first = await gateway.predict(some_windows(16))
        assert first.headers["ratelimit-policy"] == '"predict";q=20;w=60'
        assert first.headers["ratelimit"].startswith('"predict";r=4;t=')
        refused = await gateway.predict(some_windows(5))
        problem = assert_problem(refused, 429, "quota-exceeded")
        assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
        assert problem["violated-policies"] == ["predict"]
        assert refused.headers["ratelimit"].startswith('"predict";r=4;t=')
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert (await gateway.predict(some_windows(4))).status_code == 200
        assert len(gateway.calls()) == 2


async def test_sixteen_requests_cost_what_one_of_sixteen_costs(make_gateway: MakeGateway) -> None:
    async with make_gateway() as gateway:
        for _ in range(16):
            singles = await gateway.predict(some_windows(1), subject="a")
        batch = await gateway.predict(some_windows(16), subject="b")
        assert singles.headers["ratelimit"].split(";")[1] == batch.headers["ratelimit"].split(";")[1]


async def test_many_tokens_of_one_subject_share_one_limit(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=10) as gateway:
        statuses = []
        for _ in range(15):
            gateway.wall_clock.advance(1)  # another token each time
            statuses.append((await gateway.predict()).status_code)
        assert statuses == [200] * 10 + [429] * 5
        assert (await gateway.predict(subject="another")).status_code == 200


async def test_bad_input_costs_nothing(make_gateway: MakeGateway) -> None:
    async with make_gateway(rate_limit=1) as gateway:
        for _ in range(5):
            assert (await gateway.predict(body=b"x")).status_code == 422
        assert (await gateway.predict()).status_code == 200


# --- failures behind the edge


@pytest.mark.parametrize("code", sorted(ERRORS_BY_CODE))
async def test_every_failure_of_the_model_side_is_a_problem_without_its_inside(
    make_gateway: MakeGateway, code: str
) -> None:
    async with make_gateway(legacy="off") as gateway:
        gateway.ray_serve.error = gateway.legacy.error = ERRORS_BY_CODE[code](MARK)
        response = await gateway.predict(scopes="predict ops", headers={"X-Route-To": "ray_serve"})
        if response.status_code >= 500:
            assert MARK not in response.text
        assert response.headers["content-type"] == PROBLEM_JSON
        assert ("retry-after" in response.headers) == (response.status_code == 503)


async def test_shedding_says_so(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.error = Overloaded("full")
    response = await gateway.predict()
    problem = assert_problem(response, 503, "temporary-reduced-capacity")
    assert problem["type"].startswith("https://iana.org/")
    assert response.headers["retry-after"] in {"1", "2"}
    assert client_calls(gateway.legacy) == []


async def test_an_invalid_answer_is_withheld(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.error = gateway.legacy.error = ModelOutputInvalid("NaN")
    assert_problem(await gateway.predict(), 502, "model-output-invalid")


async def test_a_fault_nobody_foresaw_is_a_500_without_its_inside_and_is_logged(make_gateway: MakeGateway) -> None:
    async with make_gateway() as gateway:
        gateway.ray_serve.error = RuntimeError(f"{MARK} /etc/passwd")
        response = await gateway.predict()
        problem = assert_problem(response, 500, "internal-error")
        assert "passwd" not in response.text
        request_id = problem["instance"]
    traces = [line for line in gateway.log_lines() if line.get("request_id") == request_id and "trace" in line]
    assert len(traces) == 1
    assert "RuntimeError" in traces[0]["trace"]


async def test_a_deadline_that_passed_is_504(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.error = gateway.legacy.error = DeadlineExceeded()
    assert_problem(await gateway.predict(), 504, "deadline-exceeded")


async def test_a_backend_that_forgets_the_deadline_is_given_up(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.gate.clear()
    response = await gateway.predict(headers={"X-Request-Timeout-Ms": "30"})
    assert_problem(response, 504, "deadline-exceeded")
    assert gateway.ray_serve.cancelled >= 1


async def test_a_body_that_never_comes_is_504(gateway: GatewayUnderTest) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"\0"
        await asyncio.Event().wait()

    headers = {"Content-Type": "application/octet-stream", "X-Request-Timeout-Ms": "30", **gateway.bearer()}
    response = await gateway.client.post("/ray-serve/predict", content=body(), headers=headers)
    assert_problem(response, 504, "deadline-exceeded")


# --- clients that leave


class Connection:
    """A request as a server hands it over, with a client that can leave."""

    def __init__(self, gateway: GatewayUnderTest, body: bytes) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self._incoming = [{"type": "http.request", "body": body, "more_body": False}]
        headers = gateway.bearer() | {"Content-Type": "application/octet-stream"}
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/ray-serve/predict",
            "raw_path": b"/ray-serve/predict",
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"gateway"),
                *((name.lower().encode(), value.encode()) for name, value in headers.items()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    async def receive(self) -> Any:
        if self._incoming:
            return self._incoming.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def test_a_client_that_leaves_cancels_its_call(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.gate.clear()
    connection = Connection(gateway, some_windows(1).tobytes())
    request = asyncio.create_task(gateway.app(connection.scope, connection.receive, connection.send))
    while not gateway.calls():
        await asyncio.sleep(0)
    cancelled_before = gateway.ray_serve.cancelled
    connection.left.set()
    done, _ = await asyncio.wait({request}, timeout=0.1)
    assert done == {request}
    assert gateway.ray_serve.cancelled == cancelled_before + 1
    assert connection.sent[0]["status"] == 499


async def test_a_client_that_leaves_before_its_body_calls_nobody(gateway: GatewayUnderTest) -> None:
    connection = Connection(gateway, b"")
    connection._incoming.clear()
    connection.left.set()
    await gateway.app(connection.scope, connection.receive, connection.send)
    assert connection.sent[0]["status"] == 499
    assert gateway.calls() == []


async def test_a_client_that_stays_is_answered(gateway: GatewayUnderTest) -> None:
    connection = Connection(gateway, some_windows(1).tobytes())
    await gateway.app(connection.scope, connection.receive, connection.send)
    assert [message.get("status") for message in connection.sent] == [200, None]


# --- method and documentation


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
async def test_other_methods_are_405(gateway: GatewayUnderTest, method: str) -> None:
    response = await gateway.client.request(method, "/ray-serve/predict")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


async def test_openapi_shows_the_route_whole(gateway: GatewayUnderTest) -> None:
    document = (await gateway.client.get("/openapi.json")).json()
    operation = document["paths"]["/ray-serve/predict"]["post"]
    assert operation["tags"] == ["ray-serve"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    statuses = {"200", "400", "401", "403", "404", "413", "415", "422", "429", "500", "502", "503", "504", "default"}
    assert set(operation["responses"]) == statuses
    for status, response in operation["responses"].items():
        assert set(response["content"]) == {"application/json" if status == "200" else PROBLEM_JSON}
    assert {(p["in"], p["name"].lower()) for p in operation["parameters"]} == {
        ("query", "return_uncertainty"),
        ("query", "use_ensemble"),
        ("query", "return_features"),
        ("header", "x-request-timeout-ms"),
        ("header", "x-request-id"),
        ("header", "x-route-to"),
        ("header", "x-route-key"),
        ("header", "x-symbol"),
    }
    assert operation["security"] == [{"HTTPBearer": []}]
