"""What OpenAPI says of the protocol's routes: shapes of bodies, and the inference routes, which are plain ASGI."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Path
from pydantic import BaseModel, ConfigDict, Field

from app.api.oip.codec import MAX_ID_CHARS
from app.api.oip.tensors import DATATYPE, INPUT, INPUT_SHAPE, ON_REQUEST, OUTPUT_SHAPES
from app.api.schemas import RequestId, RouteKey, RouteTo, Symbol, TimeoutMs, Token


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="-1 where the request or the model decides.")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str] = Field(description="Served now.")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Duration(BaseModel):
    count: int
    ns: int


class ComputeStatistics(BaseModel):
    compute_input: Duration = Field(description="Decoding.")
    compute_infer: Duration = Field(description="The forward pass.")
    compute_output: Duration = Field(description="Encoding.")


class BatchStatistics(ComputeStatistics):
    batch_size: int


class InferenceDurations(ComputeStatistics):
    success: Duration
    fail: Duration
    queue: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(BaseModel):
    """Of one version, since this worker's start."""

    name: str
    version: str | None = Field(None, description="Absent where it is not known.")
    last_inference: int = Field(description="Milliseconds since the epoch.")
    inference_count: int = Field(description="Windows.")
    execution_count: int = Field(description="Groups of windows, as the gateway sends them.")
    inference_stats: InferenceDurations
    batch_stats: list[BatchStatistics]


class Statistics(BaseModel):
    model_stats: list[ModelStatistics]


class InferInput(BaseModel):
    name: str = Field(json_schema_extra={"const": INPUT})
    datatype: str = Field(json_schema_extra={"const": DATATYPE})
    shape: list[int] = Field(description="[B, " + ", ".join(map(str, INPUT_SHAPE[1:])) + "]")
    parameters: dict[str, Any] = Field({}, description="`binary_data_size`: bytes of this input behind the JSON.")
    data: list[Any] | None = Field(None, description="Numbers, flat or nested as the shape; absent for binary data.")


class RequestedOutput(BaseModel):
    name: str = Field(json_schema_extra={"enum": list(OUTPUT_SHAPES)})
    parameters: dict[str, Any] = Field({}, description="`binary_data`: whether it comes as bytes behind the JSON.")


class InferRequestBody(BaseModel):
    """Unknown fields and parameters are ignored."""

    id: str | None = Field(None, max_length=MAX_ID_CHARS, description="Comes back as it is.")
    parameters: dict[str, Any] = Field(
        {},
        description="`timeout`: microseconds until the deadline. `binary_data_output`: outputs as bytes. "
        "`use_ensemble`, `return_uncertainty`: true unless set to false.",
    )
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] = Field(
        [], description="All but " + ", ".join(sorted(ON_REQUEST)) + " unless given."
    )


class InferOutput(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = Field(None, description="`binary_data_size`: its bytes behind the JSON.")
    data: list[float] | None = Field(None, description="Flat, in row-major order; absent for binary data.")


class InferResponseBody(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str | None = Field(None, description="Absent where a remote legacy does not tell.")
    id: str | None = Field(None, description="The request's, where it had one.")
    outputs: list[InferOutput]


class Error(BaseModel):
    """Every refusal below `/v2`."""

    error: str


_REFUSALS = {
    400: "The request is not what the protocol or the model asks for.",
    401: "No valid token.",
    403: "The token does not allow this.",
    404: "No such model, or a version that is not served.",
    413: "The body is too large, as sent or once inflated.",
    415: "The body's type or encoding is not taken.",
    429: "The caller's rate limit is used up.",
    500: "An unforeseen failure.",
    502: "The model failed or its answer was invalid.",
    503: "No arm can answer now, or the queue is full.",
    504: "The deadline passed.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for these statuses and, as the protocol has no 422, for whatever else may come."""
    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": _REFUSALS[status], "model": Error} for status in statuses
    }
    return {**documented, "default": {"description": "Any other refusal.", "model": Error}}


_HeaderLength = Annotated[
    int | None,
    Header(
        alias="inference-header-content-length",
        ge=0,
        description="Length of the JSON where bytes follow it; 0 where the body is the input's bytes alone.",
    ),
]


async def describe_infer(  # pragma: no cover  # only its signature is used
    model: Annotated[str, Path()],
    body: InferRequestBody,
    *,
    _: Token,
    header_length: _HeaderLength = None,
    timeout_ms: TimeoutMs = None,
    request_id: RequestId = None,
    route_to: RouteTo = None,
    route_key: RouteKey = None,
    symbol: Symbol = None,
) -> InferResponseBody:
    """Predict, by whichever version is served. Needs a token with the scope `predict`."""
    raise NotImplementedError


async def describe_infer_by_version(  # pragma: no cover  # only its signature is used
    model: Annotated[str, Path()],
    version: Annotated[str, Path()],
    body: InferRequestBody,
    *,
    _: Token,
    header_length: _HeaderLength = None,
    timeout_ms: TimeoutMs = None,
    request_id: RequestId = None,
    route_to: RouteTo = None,
    route_key: RouteKey = None,
    symbol: Symbol = None,
) -> InferResponseBody:
    """Predict by this version and no other. Needs a token with the scope `predict`."""
    raise NotImplementedError


_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def document_infer(name: str) -> dict[str, Any]:
    """Arguments of `HotRoute` for an inference route of this name."""
    return {
        "name": name,
        "summary": "Infer",
        "tags": ["open-inference-protocol"],
        "response_model": InferResponseBody,
        "responses": {200: {"content": _BYTES}, **refusals(*_REFUSALS)},
        "openapi_extra": {"requestBody": {"required": True, "content": _BYTES}},
    }
