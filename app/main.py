"""The gateway, put together: `create_app` reads from the settings to the routes, top to bottom."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import IO

from fastapi import FastAPI, Request, Response
from prometheus_fastapi_instrumentator.instrumentation import PrometheusFastApiInstrumentator
from starlette.routing import Match

from app.api import kill, ops, outcomes, rollout
from app.api.deps import Gateway
from app.api.docs import add_docs
from app.api.hot import Dialect, HotPath, HotRoute
from app.api.oip.dialect import OpenInferenceDialect
from app.api.oip.routes import router as open_inference_router
from app.api.oip.schemas import describe_infer, describe_infer_by_version, document_infer
from app.api.predict import NativeDialect
from app.api.schemas import PREDICT_DOCUMENTATION, describe_predict
from app.auth import read_identity
from app.backends.base import Backend
from app.errors import REFUSALS, problem_response
from app.front import Front
from app.observability.ledger import Ledger
from app.observability.logs import LineWriter, logging_to
from app.observability.middleware import Edge
from app.rollout.state import StateStore
from app.settings import Settings
from app.wiring import wire

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_LOOK_S = 0.05

ROUTERS = (ops.router, ops.ray_serve_router, rollout.router, kill.router, outcomes.router, open_inference_router)


def create_app(
    settings: Settings,
    *,
    backends: Sequence[Backend] | None = None,
    store: StateStore | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    log_stream: IO[bytes] | None = None,
    notice_s: float | None = None,
    patience_s: float = 0.0,
    waits_for_keys: bool = False,
) -> FastAPI:
    """Build the gateway.

    Args:
        settings: What the operator set.
        backends: At most one of each name, `ray_serve` and `legacy`; those of the settings unless given.
        store: Where the rollout is kept; files in the state folder unless given.
        clock: Monotonic seconds, for durations and deadlines.
        wall_clock: Seconds since the epoch, for tokens and records.
        log_stream: Where log lines go; standard error unless given.
        notice_s: Seconds for which SIGTERM is told to the callers before the server sees it; None leaves signals alone.
        patience_s: Most seconds for which the start waits for every arm to be ready.
        waits_for_keys: Begin although a file of keys is damaged now, and refuse with 503 whom it would judge.

    Raises:
        ConfigError: The settings leave nothing that can answer, no token secret, or a state folder that is no good.
    """
    gateway = wire(
        settings,
        backends=backends,
        store=store,
        clock=clock,
        wall_clock=wall_clock,
        waits_for_keys=waits_for_keys,
    )
    log = LineWriter(log_stream or sys.stderr.buffer, on_drop=gateway.metrics.http.count_dropped_lines)
    app = _framework(settings, _lifespan(gateway, logging_to(log, settings.log_level), notice_s, patience_s))
    app.state.gateway = gateway
    _add_routes(app, settings, gateway, log if settings.access_log else None)
    return app


def _add_routes(app: FastAPI, settings: Settings, gateway: Gateway, access_log: LineWriter | None) -> None:
    """The routes, and what stands around all of them."""
    hot_routes = _hot_routes(settings, gateway)
    app.router.routes.extend(hot_routes.values())
    for router in ROUTERS:
        app.include_router(router)
    if settings.docs:
        add_docs(app)
    PrometheusFastApiInstrumentator(registry=gateway.metrics.registry, should_group_status_codes=False).add(
        gateway.metrics.http.count_instrumented
    ).instrument(app)
    app.add_middleware(
        Edge,
        hot_routes=hot_routes,
        front=Front(hosts=settings.allowed_hosts, origins=settings.cors_origins, behind_tls=settings.behind_tls),
        metrics=gateway.metrics,
        drain=gateway.drain,
        clock=gateway.clock,
        access_log=access_log,
    )


def _framework(settings: Settings, lifespan: Lifespan) -> FastAPI:
    return FastAPI(
        title="Sluice",
        version=version("sluice"),
        summary="Predictions of a CNN+LSTM model, moved from an old path to Ray Serve step by step",
        lifespan=lifespan,
        docs_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers=dict.fromkeys(REFUSALS, _refuse),
    )


def _hot_routes(settings: Settings, gateway: Gateway) -> Mapping[str, HotRoute]:
    """The routes that answer predictions, by the path under which the edge finds them: one quota behind all of them.

    A path with parameters is no request's; the walk through the application's routes finds that one.
    """

    def path(dialect: Dialect) -> HotPath:
        return HotPath(
            dialect,
            door=gateway.door,
            model=gateway.model,
            limits=gateway.limits,
            kills=gateway.kills,
            dispatcher=gateway.dispatcher,
            trial=gateway.trial,
            metrics=gateway.metrics,
            statistics=gateway.statistics,
            sticky_key=gateway.sticky_key,
            max_timeout_ms=settings.max_timeout_ms,
            route_key_principals=frozenset(map(read_identity, settings.route_key_subjects)),
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
    gateway: Gateway, logging: AbstractContextManager[None], notice_s: float | None, patience_s: float
) -> Lifespan:
    """What runs while the gateway serves; it begins quickly whatever Ray or the model do, and ends in reverse."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(logging)
            if notice_s is not None:
                gateway.drain.begin_on_sigterm(notice_s)
            for service in gateway.services:
                stack.push_async_callback(service.stop)
                await service.start()
            await _await_arms(gateway, patience_s)
            gc.freeze()  # what is here now stays: no full collection need walk over it while callers wait
            yield

    return lifespan


async def _await_arms(gateway: Gateway, patience_s: float) -> None:
    """Others serve meanwhile: a worker that took their connections too early would answer 503 where they need not."""
    for _ in range(round(patience_s / _LOOK_S)):
        if all(backend.status().ready for backend in gateway.backends):
            return
        await asyncio.sleep(_LOOK_S)


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
