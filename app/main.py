"""The gateway, put together: `create_app` reads from the settings to the routes, top to bottom."""

from __future__ import annotations

import gc
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import IO

from fastapi import FastAPI, Request, Response
from prometheus_fastapi_instrumentator.instrumentation import PrometheusFastApiInstrumentator
from starlette.routing import Match

from app.api import ops, rollout
from app.api.deps import Gateway
from app.api.docs import add_docs
from app.api.hot import Dialect, HotPath, HotRoute
from app.api.oip.dialect import OpenInferenceDialect
from app.api.oip.routes import router as open_inference_router
from app.api.oip.schemas import describe_infer, describe_infer_by_version, document_infer
from app.api.predict import NativeDialect
from app.api.schemas import PREDICT_DOCUMENTATION, describe_predict
from app.auth import Key, KeySet, TokenVerifier
from app.backends.base import Backend
from app.backends.in_process import InProcessBackend, RegistrySource
from app.backends.probe import Prober
from app.backends.ray_serve import RayServeBackend
from app.backends.remote import RemoteBackend
from app.errors import REFUSALS, problem_response
from app.observability.ledger import Ledger
from app.observability.logs import LineWriter, logging_to
from app.observability.metrics import Metrics
from app.observability.middleware import Edge
from app.observability.statistics import InferenceStatistics
from app.rate_limit import Counters, SlidingWindowLimiter
from app.rollout.dispatch import Dispatcher
from app.rollout.state import FileStore, Rollout, StateStore
from app.settings import ConfigError, SecretFile, Settings, read_secret_file

ROUTERS = (ops.router, ops.ray_serve_router, rollout.router, open_inference_router)


def create_app(
    settings: Settings,
    *,
    backends: Sequence[Backend] | None = None,
    store: StateStore | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    log_stream: IO[bytes] | None = None,
) -> FastAPI:
    """Build the gateway.

    Args:
        settings: What the operator set.
        backends: At most one of each name, `ray_serve` and `legacy`; those of the settings unless given.
        store: Where the rollout is kept; files in the state folder unless given.
        clock: Monotonic seconds, for durations and deadlines.
        wall_clock: Seconds since the epoch, for tokens and records.
        log_stream: Where log lines go; standard error unless given.

    Raises:
        ConfigError: The settings leave nothing that can answer, no token secret, or a state folder that is no good.
    """
    sticky_key = _sticky_key(settings)
    gateway = _wire(
        settings,
        _backends_of(settings, clock) if backends is None else backends,
        FileStore(settings.state_dir) if store is None else store,
        sticky_key=sticky_key,
        clock=clock,
        wall_clock=wall_clock,
    )
    hot_routes = _hot_routes(settings, gateway, sticky_key)
    log = LineWriter(log_stream or sys.stderr.buffer)
    app = FastAPI(
        title="Sluice",
        version=version("sluice"),
        summary="Predictions of a CNN+LSTM model, moved from an old path to Ray Serve step by step",
        lifespan=_lifespan(gateway, log, settings.log_level),
        docs_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers=dict.fromkeys(REFUSALS, _refuse),
    )
    app.state.gateway = gateway
    app.router.routes.extend(hot_routes.values())
    for router in ROUTERS:
        app.include_router(router)
    if settings.docs:
        add_docs(app)
    PrometheusFastApiInstrumentator(registry=gateway.metrics.registry, should_group_status_codes=False).add(
        gateway.metrics.count_instrumented
    ).instrument(app)
    app.add_middleware(
        Edge,
        hot_routes=hot_routes,
        metrics=gateway.metrics,
        clock=clock,
        access_log=log if settings.access_log else None,
    )
    return app


def _wire(
    settings: Settings,
    backends: Sequence[Backend],
    store: StateStore,
    *,
    sticky_key: bytes,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> Gateway:
    share = Rollout(store, initial_fraction=settings.ray_serve_fraction, wall_clock=wall_clock)
    return Gateway(
        backends=backends,
        dispatcher=Dispatcher(backends, fraction=share.fraction, sticky_key=sticky_key, clock=clock),
        rollout=share,
        prober=Prober(backends, clock=clock, wall_clock=wall_clock),
        verifier=TokenVerifier(
            KeySet({None: Key.hs256(settings.signing_secret())}),
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            wall_clock=wall_clock,
        ),
        metrics=Metrics(settings.multiproc_dir),
        statistics=InferenceStatistics(wall_clock),
        metrics_public=settings.metrics_public,
        model=settings.model,
        clock=clock,
        started_at=clock(),
    )


def _hot_routes(settings: Settings, gateway: Gateway, sticky_key: bytes) -> Mapping[str, HotRoute]:
    """The routes that answer predictions, by the path under which the edge finds them: one quota behind all of them.

    A path with parameters is no request's; the walk through the application's routes finds that one.
    """
    limiter = SlidingWindowLimiter(Counters(gateway.clock), limit=settings.rate_limit)

    def path(dialect: Dialect) -> HotPath:
        return HotPath(
            dialect,
            verifier=gateway.verifier,
            limiter=limiter,
            dispatcher=gateway.dispatcher,
            metrics=gateway.metrics,
            statistics=gateway.statistics,
            sticky_key=sticky_key,
            max_timeout_ms=settings.max_timeout_ms,
            route_key_subjects=settings.route_key_subjects,
            clock=gateway.clock,
        )

    native = path(NativeDialect(settings.max_body_bytes))
    open_inference = path(OpenInferenceDialect(settings.model, settings.max_body_bytes))
    by_version = "/v2/models/{model}/versions/{version}/infer"
    return {
        "/ray-serve/predict": HotRoute("/ray-serve/predict", native, describe_predict, PREDICT_DOCUMENTATION),
        f"/v2/models/{settings.model}/infer": HotRoute(
            "/v2/models/{model}/infer", open_inference, describe_infer, document_infer("infer")
        ),
        by_version: HotRoute(by_version, open_inference, describe_infer_by_version, document_infer("infer_by_version")),
    }


def _lifespan(
    gateway: Gateway, log: LineWriter, log_level: str
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What runs while the gateway serves; it begins quickly whatever Ray or the model do, and ends in reverse."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(logging_to(log, log_level))
            await gateway.rollout.load()
            for backend in gateway.backends:
                stack.push_async_callback(backend.stop)
                await backend.start()
            stack.push_async_callback(gateway.prober.stop)
            await gateway.prober.start()
            gc.freeze()  # what is here now stays: no full collection need walk over it while callers wait
            yield

    return lifespan


def _backends_of(settings: Settings, clock: Callable[[], float]) -> list[Backend]:
    backends: list[Backend] = []
    if settings.ray_address is not None:
        backends.append(RayServeBackend(settings.ray_address, max_wait_s=settings.max_wait_ms / 1e3, clock=clock))
    if settings.legacy == "in_process":
        backends.append(_in_process(settings, clock))
    if settings.legacy == "remote":
        backends.append(_remote(settings, clock))
    if not backends:
        raise ConfigError("nothing can answer: set RAY_ADDRESS, or GATEWAY_LEGACY=in_process")
    return backends


def _in_process(settings: Settings, clock: Callable[[], float]) -> InProcessBackend:
    source = RegistrySource(
        settings.registry_path,
        model=settings.model,
        version=settings.model_version,
        engine=settings.engine,
        device=settings.device,
        threads=settings.engine_threads,
        key_file=settings.registry_key_file,
        exact=settings.exact,
    )
    return InProcessBackend(
        source,
        cache_size=settings.model_cache_size,
        cache_ttl_s=settings.model_cache_ttl_s,
        max_wait_s=settings.max_wait_ms / 1e3,
        clock=clock,
    )


def _remote(settings: Settings, clock: Callable[[], float]) -> RemoteBackend:
    assert settings.legacy_url is not None, "checked with the settings"
    token = None if settings.legacy_token_file is None else SecretFile(settings.legacy_token_file)
    try:
        return RemoteBackend(
            settings.legacy_url,
            path=settings.legacy_path,
            ca_file=settings.legacy_ca_file,
            token=token,
            max_wait_s=settings.max_wait_ms / 1e3,
            clock=clock,
        )
    except ValueError as error:
        raise ConfigError(f"GATEWAY_LEGACY=remote: {error}") from error


def _sticky_key(settings: Settings) -> bytes:
    """The key that keeps callers on their arm: the operator's, or a random one that the state folder keeps."""
    if settings.sticky_key is not None:
        return settings.sticky_key.get_secret_value().encode()
    path = settings.state_dir / "sticky.key"
    try:
        _write_once(path, secrets.token_hex(32).encode())
        return read_secret_file(path)
    except OSError as error:
        raise ConfigError(f"cannot keep state in {settings.state_dir}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _write_once(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


async def _refuse(request: Request, error: Exception) -> Response:
    response = problem_response(error, request.scope["path"], Ledger.of(request.scope).request_id)
    if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED and (methods := _methods(request)):
        # The framework names the methods of the first route of this path alone.
        response.headers["Allow"] = ", ".join(sorted(methods))
    return response


def _methods(request: Request) -> set[str]:
    """Every method that some route answers on the request's path."""
    routes = (route for router in ROUTERS for route in router.routes)
    matching = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in matching for method in getattr(route, "methods", None) or ()}
