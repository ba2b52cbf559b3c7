from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException

from app import errors
from app.errors import (
    PROBLEM_JSON,
    BadRequest,
    ClientGone,
    GatewayError,
    InvalidInput,
    Killed,
    problem_of,
    problem_response,
)
from serve_app.contract import ERRORS_BY_CODE, InvalidWindows, Overloaded, ServingError

MARK = "qx-marks-the-inside"


def kinds(base: type) -> set[type]:
    return {base}.union(*(kinds(kind) for kind in base.__subclasses__()))


def test_every_failure_of_the_model_side_has_its_status() -> None:
    assert set(errors._SERVING) == set(ERRORS_BY_CODE)


def test_no_failure_of_the_model_side_is_missing_from_the_contract_s_table() -> None:
    assert {kind for kind in kinds(ServingError) if kind.__module__ == "serve_app.contract"} == {
        *ERRORS_BY_CODE.values()
    }


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("serving-error", 500),
        ("invalid-windows", 422),
        ("model-not-found", 404),
        ("model-output-invalid", 502),
        ("model-failed", 502),
        ("deadline-exceeded", 504),
        ("unavailable", 503),
        ("not-ready", 503),
        ("overloaded", 503),
        ("replica-lost", 503),
    ],
)
def test_statuses_of_the_model_side(code: str, status: int) -> None:
    problem = problem_of(ERRORS_BY_CODE[code](MARK))
    assert problem.status == status
    assert ("Retry-After" in problem.headers) == (status == 503)
    assert problem.headers.get("Retry-After", "1").isdigit()
    assert (MARK in problem.detail) == (status < 500)


def test_every_refusal_has_a_code_and_a_status_of_its_own_kind() -> None:
    own = {kind for kind in kinds(GatewayError) - {GatewayError} if "code" in vars(kind)}
    assert len({kind.code for kind in own}) == len(own)
    assert all(400 <= kind.status < 500 or kind.status == 503 for kind in own)
    made = {Killed("model"), *(kind() for kind in own - {Killed} if kind.status == 503)}
    assert all("Retry-After" in refusal.headers for refusal in made)


def test_unknown_exceptions_say_nothing() -> None:
    problem = problem_of(ValueError(MARK))
    assert problem.status == 500
    assert MARK.encode() not in problem.body("id")


@pytest.mark.parametrize("status", [400, 403, 404, 405, 415, 422, 418, 500, 501])
def test_the_framework_s_own_detail_is_not_passed_on(status: int) -> None:
    problem = problem_of(HTTPException(status, detail=MARK, headers={"Allow": "GET"}))
    assert problem.status == (status if status in errors._HTTP_ERRORS else 500)
    assert MARK.encode() not in problem.body("id")
    assert problem.headers == {"Allow": "GET"}


def test_a_problem_is_at_most_four_kibibytes() -> None:
    body = problem_of(BadRequest("x" * 100_000)).body("i" * 32)
    assert len(body) <= 4096
    assert json.loads(body)["status"] == 400


def test_a_subclass_of_the_contract_s_errors_keeps_its_status() -> None:
    class OwnInvalid(InvalidWindows):
        pass

    assert problem_of(OwnInvalid("too short")).status == 422


def test_members_extend_the_problem() -> None:
    assert json.loads(problem_of(InvalidInput("x", members={"pointer": "/data"})).body("id"))["pointer"] == "/data"


def test_a_client_that_left_is_no_failure_of_ours() -> None:
    assert problem_of(ClientGone()).status == 499


@pytest.mark.parametrize("path", ["/v2", "/v2/models/cnn_lstm/infer", "/v2/none"])
def test_the_open_inference_protocol_has_a_form_of_its_own(path: str) -> None:
    response = problem_response(InvalidInput("x" * 100_000, members={"pointer": "/inputs"}), path, "id")
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert json.loads(response.body) == {"error": "x" * 300}


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        ("overloaded", {1, 2}),
        ("out-of-memory", {1}),
        *((code, {5}) for code in ("unavailable", "not-ready", "replica-lost")),
    ],
)
def test_shed_callers_are_spread_and_who_finds_the_model_away_is_told_five_seconds(
    code: str, seconds: set[int]
) -> None:
    told = {int(problem_of(ERRORS_BY_CODE[code]()).headers["Retry-After"]) for _ in range(200)}
    assert told == seconds


@pytest.mark.parametrize("path", ["/", "/v20", "/v2x/models", "/ray-serve/predict"])
def test_everywhere_else_a_refusal_is_a_problem(path: str) -> None:
    response = problem_response(InvalidInput("x"), path, "id")
    assert (response.status_code, response.media_type) == (422, PROBLEM_JSON)


def test_the_open_inference_protocol_keeps_status_and_headers_of_what_is_no_input_error() -> None:
    response = problem_response(Overloaded(MARK), "/v2/models/cnn_lstm/infer", "id")
    assert response.status_code == 503
    assert response.headers["retry-after"] in {"1", "2"}
    assert MARK.encode() not in response.body
    assert json.loads(response.body)["error"]
