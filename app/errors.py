"""Every way in which the gateway refuses, and how a refusal is said: RFC 9457 `application/problem+json`.

Below `/v2` the Open Inference Protocol rules: `{"error": …}`, and input errors are 400 whatever their kind.

    GatewayError                                    500   a fault of ours that nobody foresaw
    ├── BadRequest            bad-request           400   the body or a header value cannot be parsed
    ├── Unauthenticated       invalid-token         401   no token, or none that counts
    ├── Forbidden             insufficient-scope    403   the token does not allow this
    ├── NotFound              not-found             404
    ├── MethodNotAllowed      method-not-allowed    405
    ├── BodyTooLarge          body-too-large        413
    ├── UnsupportedBody       unsupported-body      415   a type or encoding we do not take
    ├── InvalidInput          invalid-input         422   parsed, but not what is asked for
    ├── HeadTooLarge          head-too-large        431   more headers, or longer ones, than any client needs
    ├── RateLimited           quota-exceeded        429   the caller's limit
    │   └── TooManyAtOnce     too-many-at-once      429   the caller's requests that are under way
    ├── TooManyFailures       too-many-failures     429   the address sent too many bad credentials
    ├── ClientGone            client-gone           499   nobody waits for the answer any more; never sent
    ├── Killed                killed                503   an operator stopped what the request asks for
    ├── IdentityUnavailable   identity-unavailable  503   what credentials are judged by is not known now
    └── StateUnavailable      state-unavailable     503   what all gateways share cannot be changed now

Failures of the model side (`serve_app.contract`) have their statuses in `_SERVING`. A detail of a 4xx says what to
change; that of a 5xx is constant, so that nothing of the inside can show.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve_app.contract import ServingError

PROBLEM_JSON = "application/problem+json"
OPEN_INFERENCE = "/v2"

_OWN_TYPES = "urn:sluice:problem:"
_IANA_TYPES = "https://iana.org/assignments/http-problem-types#"
MAX_BODY_BYTES = 4096
_MAX_DETAIL_CHARS = 300
_MAX_FAULTS = 10


class GatewayError(Exception):
    """Base of every refusal.

    Args:
        detail: One sentence for the caller; never a value that the caller sent.
        headers: Response headers beside the common ones.
        members: Extension members of the problem.
    """

    status = 500
    code = "internal-error"
    title = "The gateway failed"

    def __init__(
        self, detail: str = "", *, headers: dict[str, str] | None = None, members: dict[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}
        self.members = members or {}


class BadRequest(GatewayError):
    status, code, title = 400, "bad-request", "The request cannot be parsed"


class Unauthenticated(GatewayError):
    """One answer for every cause, so that a stranger learns nothing by trying.

    Args:
        reason: Why, for our own books; one of `app.auth.FAILURES`.
    """

    status, code, title = 401, "invalid-token", "No valid token"

    def __init__(self, reason: str = "malformed") -> None:
        super().__init__(
            "send a valid token: Authorization: Bearer TOKEN",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        )
        self.reason = reason


class Forbidden(GatewayError):
    status, code, title = 403, "insufficient-scope", "The token does not allow this"


class NotFound(GatewayError):
    status, code, title = 404, "not-found", "There is nothing here"


class MethodNotAllowed(GatewayError):
    status, code, title = 405, "method-not-allowed", "This method is not served here"


class Conflict(GatewayError):
    status, code, title = 409, "conflict", "The present state does not allow this"


class BodyTooLarge(GatewayError):
    """The connection is closed with it, so that the rest of the body is not read either."""

    status, code, title = 413, "body-too-large", "The body is too large"

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(f"a body may have at most {max_body_bytes} bytes", headers={"Connection": "close"})


class UnsupportedBody(GatewayError):
    status, code, title = 415, "unsupported-body", "This kind of body is not taken here"


class InvalidInput(GatewayError):
    status, code, title = 422, "invalid-input", "The request is not what is asked for"


class HeadTooLarge(GatewayError):
    """The connection is closed with it, so that the rest of the head is not read either."""

    status, code, title = 431, "head-too-large", "The request's head is too large"

    def __init__(self) -> None:
        super().__init__("the request has too many headers, or too long ones", headers={"Connection": "close"})


class RateLimited(GatewayError):
    status, code, title = 429, "quota-exceeded", "Your rate limit is used up"


class TooManyAtOnce(RateLimited):
    """The caller need not wait for a window to pass: any of its answers makes room."""

    code, title = "too-many-at-once", "Too many of your requests are under way"


class TooManyFailures(GatewayError):
    """Stands in for 401 once an address has failed too often; who has a valid credential never sees it."""

    status, code, title = 429, "too-many-failures", "Too many attempts have failed"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            "too many invalid credentials came from your address; wait before the next",
            headers={"Retry-After": str(retry_after_s)},
        )


class ClientGone(GatewayError):
    status, code, title = 499, "client-gone", "The client left"


class IdentityUnavailable(GatewayError):
    """What credentials are judged by is not there, so neither yes nor no would be true."""

    status, code, title = 503, "identity-unavailable", "Credentials cannot be judged now"

    def __init__(self) -> None:
        super().__init__("what tokens and keys are judged by is not known now; try again", headers={"Retry-After": "5"})


_KILLED = {
    "global": "predictions were stopped by an operator",
    "model": "predictions of this model were stopped by an operator",
    "principal": "predictions for this principal were stopped by an operator",
    "symbol": "predictions for this symbol were stopped by an operator",
}


class Killed(GatewayError):
    """Why it was stopped is the operators' own affair.

    Args:
        scope: What was stopped; one of `app.rollout.kills.SCOPES`.
    """

    status, code, title = 503, "killed", "Stopped by an operator"

    def __init__(self, scope: str) -> None:
        super().__init__(_KILLED[scope], headers={"Retry-After": "30"}, members={"scope": scope})


class StateUnavailable(GatewayError):
    """Written here alone, a change would be undone, or undo another one, once the gateways meet again."""

    status, code, title = 503, "state-unavailable", "The shared state cannot be changed now"

    def __init__(self, detail: str = "nothing was changed; try again") -> None:
        super().__init__(detail, headers={"Retry-After": "5"})


@dataclass(frozen=True, slots=True)
class Problem:
    """A refusal as it goes over the wire."""

    status: int
    code: str
    title: str
    detail: str
    headers: dict[str, str] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> str:
        if self.code in {"quota-exceeded", "temporary-reduced-capacity"}:
            return _IANA_TYPES + self.code
        return _OWN_TYPES + self.code

    def body(self, request_id: str) -> bytes:
        """The problem document; at most 4 KiB, for which members are left out."""
        document = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail[:_MAX_DETAIL_CHARS],
            "instance": request_id,
        }
        body = orjson.dumps({**document, **self.members})
        return body if len(body) <= MAX_BODY_BYTES else orjson.dumps(document)


# One row per code of `serve_app.contract.ERRORS_BY_CODE`: status, problem code, title, constant detail of a 5xx.
_SERVING: dict[str, tuple[int, str, str, str]] = {
    "serving-error": (500, "internal-error", "The model side failed", "an unforeseen failure; it is logged"),
    "invalid-windows": (422, "invalid-windows", "The windows are not what the model takes", ""),
    "model-not-found": (404, "model-not-found", "No such model or version", ""),
    "model-output-invalid": (
        502,
        "model-output-invalid",
        "The model's answer was invalid",
        "the model answered something that nobody may act on; it was withheld",
    ),
    "model-failed": (502, "model-failed", "The model failed", "the model could not compute an answer"),
    "deadline-exceeded": (504, "deadline-exceeded", "The deadline passed", "there was no answer before the deadline"),
    "unavailable": (503, "unavailable", "The model is away", "no model can answer now; try again later"),
    "not-ready": (503, "not-ready", "The model is not ready", "no model can answer yet; try again later"),
    "overloaded": (
        503,
        "temporary-reduced-capacity",
        "Too much work at once",
        "the queue is full and the request was shed; try again shortly",
    ),
    "out-of-memory": (503, "out-of-memory", "Out of memory", "the model's device has no memory now; try again shortly"),
    "replica-lost": (503, "replica-lost", "The model was lost", "the replica that held the request died; try again"),
}


# What routes raise on purpose; everything else is a fault of ours.
REFUSALS = (GatewayError, ServingError, HTTPException, RequestValidationError)


def problem_of(error: BaseException) -> Problem:
    """Translate any exception into its refusal; what is unknown is a 500 that says nothing of the inside."""
    if isinstance(error, GatewayError):
        return Problem(error.status, error.code, error.title, error.detail, error.headers, error.members)
    if isinstance(error, ServingError):
        return _serving_problem(error)
    if isinstance(error, HTTPException):
        return _http_problem(error)
    if isinstance(error, RequestValidationError):
        return problem_of(invalid_model(error))
    return Problem(500, GatewayError.code, GatewayError.title, "an unforeseen failure; it is logged")


def _serving_problem(error: ServingError) -> Problem:
    status, code, title, detail = _SERVING[error.code]
    headers = {"Retry-After": _retry_after(error.code)} if status == 503 else {}
    return Problem(status, code, title, detail if status >= 500 else error.detail, headers)


_RETRY_AFTER_S = {"overloaded": (1, 2), "out-of-memory": (1,)}
_AWAY_S = (5,)


def _retry_after(code: str) -> str:
    """Seconds, at random where work was shed: callers who were refused together are not to come back together.

    A backend that is away needs five to be back, and begins slowly by itself.
    """
    return str(random.choice(_RETRY_AFTER_S.get(code, _AWAY_S)))  # noqa: S311  # jitter, not a secret


_HTTP_ERRORS: dict[int, type[GatewayError]] = {
    400: BadRequest,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    415: UnsupportedBody,
    422: InvalidInput,
}
_HTTP_DETAILS = {
    404: "no such route",
    405: "see the Allow header",
}


def _http_problem(error: HTTPException) -> Problem:
    """What the framework refuses by itself; its own detail may quote the request and is not passed on."""
    kind = _HTTP_ERRORS.get(error.status_code, GatewayError)
    detail = _HTTP_DETAILS.get(error.status_code, kind.title.lower())
    status = error.status_code if kind is not GatewayError else 500
    return Problem(status, kind.code, kind.title, detail, dict(error.headers or {}))


def invalid_model(error: ValidationError | RequestValidationError) -> GatewayError:
    """Where the faults are and of which kind, never what was sent: the first ten, without their input."""
    faults = error.errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        return BadRequest("the body is not JSON")
    places = [{"pointer": _pointer(fault), "fault": str(fault["type"])[:60]} for fault in faults[:_MAX_FAULTS]]
    return InvalidInput("a field is missing, unknown or of the wrong kind", members={"errors": places})


def _pointer(fault: Any) -> str:
    """Where the fault is, as a JSON pointer (RFC 6901); an unknown field's name is the caller's and not repeated."""
    parts = fault["loc"][:-1] if fault["type"] == "extra_forbidden" else fault["loc"]
    return "".join(f"/{part}" for part in parts)[:100]


def problem_response(error: BaseException, path: str, request_id: str) -> Response:
    """The refusal of `error` as a response, in the form of the protocol that is spoken at `path`."""
    problem = problem_of(error)
    if path == OPEN_INFERENCE or path.startswith(OPEN_INFERENCE + "/"):
        return _open_inference_response(problem)
    return Response(problem.body(request_id), problem.status, problem.headers, PROBLEM_JSON)


def _open_inference_response(problem: Problem) -> Response:
    """Open Inference Protocol v2, REST: an error object with one sentence; the request's id is in the headers."""
    status = 400 if problem.status == InvalidInput.status else problem.status
    body = orjson.dumps({"error": (problem.detail or problem.title)[:_MAX_DETAIL_CHARS]})
    return Response(body, status, problem.headers, "application/json")
