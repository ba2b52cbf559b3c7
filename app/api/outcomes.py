"""What the market did, told by those who know it later, and how well each arm had foreseen it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from app.api.bodies import body_of, read_body, single_headers
from app.api.deps import Admin, GatewayDep, Operator
from app.api.documents import count_strings, refuse_repeated_names
from app.api.schemas import problems
from app.backends.base import MAX_CALL_WINDOWS
from app.errors import BadRequest, InvalidInput, UnsupportedBody, invalid_model
from app.rollout.experiment_log import Outcome
from serve_app.contract import DeadlineExceeded

MAX_OUTCOMES = 1000
_MAX_BODY_BYTES = 256 * 1024
_BODY_TIMEOUT_S = 2.0
_HEADERS = frozenset({b"content-type", b"content-length", b"content-encoding"})
_MAX_RETURN = 1e6  # volatilities: beyond it somebody mistook the unit

router = APIRouter(prefix="/rollout", tags=["rollout"], responses=problems(401, 403, 429))


class OutcomeOf(BaseModel):
    """What happened after one window of an answered request: its class, its return, or both."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    request_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", description="Of the answer, as the gateway gave it.")]
    window: Annotated[int, Field(ge=0, lt=MAX_CALL_WINDOWS, description="Position in the request.")] = 0
    label: Annotated[
        int | None,
        Field(
            alias="class",
            ge=0,
            le=2,
            description="0 down, 1 flat, 2 up, by the threshold that the model was trained with (its model card). It "
            "is not derived from the return: two versions may draw the line in different places.",
        ),
    ] = None
    realized: Annotated[
        float | None,
        Field(
            alias="return",
            ge=-_MAX_RETURN,
            le=_MAX_RETURN,
            description="Return over the model's horizon in units of its volatility, as the model predicts it.",
        ),
    ] = None

    @model_validator(mode="after")
    def _tells_something(self) -> OutcomeOf:
        if self.label is None and self.realized is None:
            raise ValueError("neither class nor return is given")
        return self


class Outcomes(RootModel[Annotated[list[OutcomeOf], Field(min_length=1, max_length=MAX_OUTCOMES)]]):
    """What `POST /rollout/outcomes` takes."""


@router.post(
    "/outcomes",
    openapi_extra={"requestBody": body_of(Outcomes)},
    responses={**problems(400, 413, 415, 422, 504), 503: {"description": "The log cannot be written; try again."}},
)
async def tell_outcomes(request: Request, gateway: GatewayDep, _: Admin) -> dict[str, int]:
    """Join outcomes with what was answered while an experiment ran.

    All are stored, or none. Of each window the first class and the first return count, so that telling them again
    changes nothing. `unknown` are those of requests that this gateway did not log, or has dropped as too old; an
    answer is in the log about a second after it was given.
    """
    told = _parse(await _read(request))
    outcomes = [Outcome(of.request_id, of.window, of.label, of.realized) for of in told.root]
    return dict((await gateway.desk.label(outcomes))._asdict())


@router.get(
    "/report",
    responses={**problems(504), 503: {"description": "The log cannot be read, or too many ask; try again."}},
)
async def show_report(
    gateway: GatewayDep,
    _: Operator,
    since: Annotated[
        float, Query(ge=0, le=1e11, description="Seconds since the epoch; requests before do not count.")
    ] = 0,
) -> dict[str, Any]:
    """How well each arm's answers met what happened, with intervals, over the requests that this gateway logged.

    It is up to five seconds old. A full log takes seconds to judge, and reports are made one after the other.
    """
    return await gateway.desk.report(since)


async def _read(request: Request) -> bytes:
    """The body, which is larger than that of other commands, within two seconds.

    Raises:
        UnsupportedBody: Not declared as JSON, or compressed.
        BodyTooLarge: Over 256 KiB.
        DeadlineExceeded: Not here in time.
    """
    headers = single_headers(request.scope, _HEADERS)
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedBody("Content-Type must be application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedBody("bodies must come uncompressed here", headers={"Accept-Encoding": "identity"})
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await read_body(request.receive, headers.get(b"content-length"), _MAX_BODY_BYTES)
    except TimeoutError:
        raise DeadlineExceeded from None


def _parse(body: bytes) -> Outcomes:
    """Raises `BadRequest` for what is no JSON, or gives a name twice, and `InvalidInput` for what is no outcomes."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("the body is not JSON") from None
    if type(document) is not list:
        raise InvalidInput("the body must be a JSON list")
    refuse_repeated_names(body, count_strings(document))
    try:
        return Outcomes.model_validate(document)
    except ValidationError as error:
        raise invalid_model(error) from None
