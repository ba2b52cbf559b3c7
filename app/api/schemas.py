"""What OpenAPI says of the prediction route, which is plain ASGI and would not show by itself."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Query, Security
from fastapi.security import HTTPAuthorizationCredentials
from pydantic import BaseModel, ConfigDict, Field

from app.api.deps import BEARER
from app.errors import PROBLEM_JSON
from serve_app.contract import CLASSES, MEMBERS, N_FEATURES, N_STEPS, WINDOW_BYTES

Window = Annotated[
    list[Annotated[list[float], Field(min_length=N_STEPS, max_length=N_STEPS)]],
    Field(min_length=N_FEATURES, max_length=N_FEATURES),
]


class PredictionRequest(BaseModel):
    """Windows of features by time steps, one or a batch, and what to return beside the prediction."""

    model_config = ConfigDict(extra="forbid")

    data: Window | Annotated[list[Window], Field(min_length=1)]
    return_uncertainty: bool = True
    use_ensemble: bool = True
    return_features: bool = False


# What the old service, as a remote legacy, may keep to itself.
_UNTOLD = " Null where a remote legacy service does not tell."


class Predictions(BaseModel):
    """One row per window."""

    classification_probs: list[list[float]] = Field(description="Probabilities of " + ", ".join(CLASSES) + ".")
    regression_pred: list[float] = Field(description="Expected return in units of its volatility (sd about 1).")
    ensemble_weights: list[list[float]] | None = Field(
        description="Weights of " + ", ".join(MEMBERS) + "; null without the ensemble." + _UNTOLD
    )
    features: list[list[float]] | None = Field(None, description="Fused features; only when asked for." + _UNTOLD)


class Uncertainty(BaseModel):
    """One value per window; standard deviations, but for the entropy."""

    regression_uncertainty: list[float] = Field(description="Root of aleatoric² + epistemic².")
    aleatoric: list[float] | None = Field(description="The noise that the model expects." + _UNTOLD)
    epistemic: list[float] | None = Field(description="What the model does not know." + _UNTOLD)
    predictive_entropy: list[float] | None = Field(
        description="Of the mean class distribution, in nats." + _UNTOLD,
    )


class PredictionResponse(BaseModel):
    """The answer; it always has a leading axis of windows."""

    model_config = ConfigDict(protected_namespaces=())

    predictions: Predictions
    uncertainty: Uncertainty | None = Field(description="Null when not asked for." + _UNTOLD)
    processing_time_ms: float = Field(description="What the caller waited here.")
    model_time_ms: float = Field(
        description="The forward pass of the group that these windows were part of; a remote legacy service's own time."
    )
    model_name: str | None = Field(description="In the registry." + _UNTOLD)
    model_version: str | None = Field(description="In the registry." + _UNTOLD)
    backend: str = Field(description="ray_serve or legacy.")
    request_id: str
    client_request_id: str | None


class ProblemDocument(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's id.")


# The request headers of every prediction route, and its token.
Token = Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
TimeoutMs = Annotated[
    int | None, Header(alias="x-request-timeout-ms", ge=1, description="Deadline; also the gateway's limit.")
]
RequestId = Annotated[str | None, Header(alias="x-request-id", pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
RouteTo = Annotated[
    str | None, Header(alias="x-route-to", pattern="^(ray_serve|legacy)$", description="Needs the scope ops.")
]
RouteKey = Annotated[str | None, Header(alias="x-route-key", description="Only for principals allowed by setting.")]

Symbol = Annotated[
    str | None, Header(alias="x-symbol", pattern=r"^[A-Z0-9._-]{1,32}$", description="What the windows are of.")
]


async def describe_predict(  # pragma: no cover  # only its signature is used
    body: PredictionRequest,
    *,
    _: Token,
    return_uncertainty: Annotated[bool | None, Query(description="With a binary body.")] = None,
    use_ensemble: Annotated[bool | None, Query(description="With a binary body.")] = None,
    return_features: Annotated[bool | None, Query(description="With a binary body.")] = None,
    timeout_ms: TimeoutMs = None,
    request_id: RequestId = None,
    route_to: RouteTo = None,
    route_key: RouteKey = None,
    symbol: Symbol = None,
) -> PredictionResponse:
    """Predict for one window or a batch. Needs a token with the scope `predict`."""
    raise NotImplementedError


_REFUSALS = {
    400: "The body or a header value cannot be parsed.",
    401: "No valid token.",
    403: "The token does not allow this.",
    404: "There is no such thing here.",
    409: "The present state does not allow this.",
    413: "The body is too large.",
    415: "The body's type or encoding is not taken.",
    422: "Parsed, but not what is asked for.",
    429: "The caller's rate limit is used up.",
    500: "An unforeseen failure.",
    502: "The model failed or its answer was invalid.",
    503: "No arm can answer now, or the queue is full.",
    504: "The deadline passed.",
}

_PROBLEM = {"content": {PROBLEM_JSON: {"schema": ProblemDocument.model_json_schema()}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for these statuses and for whatever else may come."""
    named: dict[int | str, dict[str, Any]] = {
        status: {"description": _REFUSALS[status], **_PROBLEM} for status in statuses
    }
    return {**named, "default": {"description": "Any other refusal.", **_PROBLEM}}


PREDICT_DOCUMENTATION: dict[str, Any] = {
    "name": "predict",
    "summary": "Predict",
    "tags": ["ray-serve"],
    "response_model": PredictionResponse,
    "responses": problems(*_REFUSALS.keys() - {409}),
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {
                    "schema": {
                        "type": "string",
                        "format": "binary",
                        "description": f"Little-endian float32 of B x {N_FEATURES} x {N_STEPS} values, "
                        f"{WINDOW_BYTES} bytes per window.",
                    }
                }
            },
        }
    },
}
