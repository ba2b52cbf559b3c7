"""What the protocol tells of the server and its model: health, metadata, readiness, statistics."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Any

import orjson
from fastapi import APIRouter, Response

from app.api.deps import Gateway, GatewayDep, Predictor, require_model
from app.api.oip.schemas import Live, ModelMetadata, ModelReady, Ready, ServerMetadata, Statistics, refusals
from app.api.oip.tensors import DATATYPE, INPUT, INPUT_SHAPE, OUTPUT_SHAPES
from app.auth import Principal
from app.errors import OPEN_INFERENCE
from serve_app.contract import ModelNotFound, NotReady

router = APIRouter(prefix=OPEN_INFERENCE, tags=["open-inference-protocol"])

_EXTENSIONS = ["binary_tensor_data", "parameters", "statistics"]
_INPUTS = [{"name": INPUT, "datatype": DATATYPE, "shape": INPUT_SHAPE}]
_OUTPUTS = [{"name": name, "datatype": DATATYPE, "shape": shape} for name, shape in OUTPUT_SHAPES.items()]
_ABOUT_SERVER = refusals(401, 403)
_ABOUT_MODEL = refusals(401, 403, 404)
_ABOUT_VERSION = refusals(401, 403, 404, 503)


@router.get("/health/live", response_model=Live)
async def show_server_live() -> Response:
    """The process answers; nothing else is asked."""
    return _json({"live": True})


@router.get("/health/ready", response_model=Ready, responses=refusals(503))
async def show_server_ready(gateway: GatewayDep) -> Response:
    """Whether at least one arm can answer now."""
    _require_ready(gateway)
    return _json({"ready": True})


@router.get("", response_model=ServerMetadata, responses=_ABOUT_SERVER)
async def show_server(_: Predictor) -> Response:
    """The server and the protocol's extensions that it has."""
    return _json({"name": "sluice", "version": installed_version("sluice"), "extensions": _EXTENSIONS})


@router.get("/models/stats", response_model=Statistics, responses=_ABOUT_SERVER)
async def show_all_statistics(gateway: GatewayDep, principal: Predictor) -> Response:
    """What every version of every model did since this worker's start."""
    return _json(_statistics(gateway) if principal.may_use(gateway.model) else {"model_stats": []})


@router.get("/models/{model}", response_model=ModelMetadata, responses=_ABOUT_MODEL)
async def show_model(model: str, gateway: GatewayDep, principal: Predictor) -> Response:
    """The model's versions that are served now, its input and its outputs."""
    _require_model(gateway, principal, model)
    return _json(_metadata(model, gateway.dispatcher.versions()))


@router.get("/models/{model}/ready", response_model=ModelReady, responses=_ABOUT_VERSION)
async def show_model_ready(model: str, gateway: GatewayDep, principal: Predictor) -> Response:
    """Whether some version of the model can answer now."""
    _require_model(gateway, principal, model)
    _require_ready(gateway)
    return _json({"name": model, "ready": True})


@router.get("/models/{model}/stats", response_model=Statistics, responses=_ABOUT_MODEL)
async def show_statistics(model: str, gateway: GatewayDep, principal: Predictor) -> Response:
    """What every version of the model did since this worker's start."""
    _require_model(gateway, principal, model)
    return _json(_statistics(gateway))


@router.get("/models/{model}/versions/{version}", response_model=ModelMetadata, responses=_ABOUT_VERSION)
async def show_version(model: str, version: str, gateway: GatewayDep, principal: Predictor) -> Response:
    """A version that is served now."""
    _require_version(gateway, principal, model, version)
    return _json(_metadata(model, [version]))


@router.get("/models/{model}/versions/{version}/ready", response_model=ModelReady, responses=_ABOUT_VERSION)
async def show_version_ready(model: str, version: str, gateway: GatewayDep, principal: Predictor) -> Response:
    """Whether this very version can answer now."""
    _require_version(gateway, principal, model, version)
    return _json({"name": model, "ready": True})


@router.get("/models/{model}/versions/{version}/stats", response_model=Statistics, responses=_ABOUT_VERSION)
async def show_version_statistics(model: str, version: str, gateway: GatewayDep, principal: Predictor) -> Response:
    """What this version did since this worker's start."""
    _require_model(gateway, principal, model)
    if version not in gateway.statistics.versions():
        _require_version(gateway, principal, model, version)
    return _json({"model_stats": [_row(gateway, version)]})


def _json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


def _metadata(model: str, versions: list[str]) -> dict[str, Any]:
    return {"name": model, "versions": versions, "platform": "sluice", "inputs": _INPUTS, "outputs": _OUTPUTS}


def _statistics(gateway: Gateway) -> dict[str, Any]:
    versions = sorted(gateway.statistics.versions().union(gateway.dispatcher.versions()))
    unversioned = [None] if gateway.statistics.has_unversioned() else []
    return {"model_stats": [_row(gateway, version) for version in (*versions, *unversioned)]}


def _row(gateway: Gateway, version: str | None) -> dict[str, Any]:
    named = {} if version is None else {"version": version}
    return {"name": gateway.model, **named, **gateway.statistics.document(version)}


def _require_model(gateway: Gateway, principal: Principal, model: str) -> None:
    if model != gateway.model:
        raise ModelNotFound("no such model")
    require_model(principal, model)


def _require_version(gateway: Gateway, principal: Principal, model: str, version: str) -> None:
    _require_model(gateway, principal, model)
    gateway.dispatcher.arms_serving(version)


def _require_ready(gateway: Gateway) -> None:
    if gateway.drain.has_begun or not any(backend.status().ready for backend in gateway.backends):
        raise NotReady("no arm can answer")
