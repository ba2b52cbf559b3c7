"""What operators and probes ask: health, readiness, statistics, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.deps import Gateway, GatewayDep, Operator, Scraper
from app.api.schemas import problems
from app.backends.base import Backend
from app.errors import NotFound
from app.rollout.dispatch import RAY_SERVE
from serve_app.contract import DeadlineExceeded

router = APIRouter(tags=["operations"], responses=problems())
ray_serve_router = APIRouter(prefix="/ray-serve", tags=["ray-serve"], responses=problems(401, 403, 429))

_STATS_TIMEOUT_S = 1.5  # backends gather within one second; this is for one that does not
_RETRY_AFTER = {"Retry-After": "5"}


@router.get("/health", responses={503: {"description": "No arm answers, or none was asked yet."}})
async def show_health(gateway: GatewayDep) -> JSONResponse:
    """Whether predictions are answered in time, from the last real inference on each arm."""
    report = gateway.prober.report()
    if report["status"] in {"healthy", "degraded"}:
        return JSONResponse(report)
    return JSONResponse(report, 503, _RETRY_AFTER)


@router.get("/health/live")
async def show_live() -> dict[str, str]:
    """The process answers; nothing else is asked."""
    return {"status": "live"}


@router.get("/health/ready", responses={503: {"description": "No arm can answer."}})
async def show_ready(gateway: GatewayDep) -> JSONResponse:
    """Whether at least one arm can answer now, and the gateway is not about to leave."""
    statuses = {backend.name: backend.status() for backend in gateway.backends}
    arms = [{"arm": name, "ready": status.ready, "reason": status.reason} for name, status in statuses.items()]
    if gateway.drain.has_begun:
        return JSONResponse({"status": "leaving", "arms": arms}, 503, _RETRY_AFTER)
    if any(status.ready for status in statuses.values()):
        return JSONResponse({"status": "ready", "arms": arms})
    return JSONResponse({"status": "not-ready", "arms": arms}, 503, _RETRY_AFTER)


@router.get("/stats", responses=problems(401, 403, 429))
async def show_stats(gateway: GatewayDep, _: Operator) -> dict[str, Any]:
    """The gateway's own figures: what it answered and refused, the rollout, and each arm's state."""
    record = gateway.rollout.record
    return {
        "uptime_s": round(gateway.clock() - gateway.started_at, 3),
        **gateway.metrics.totals(),
        "rollout": {"ray_serve_fraction": record.ray_serve_share, **record.summary()},
        "kills": gateway.kills.counts(),
        "audit": {"records": gateway.audit.head.records, "head": gateway.audit.head.hash},
        "keys": {what: source.document() for what, source in gateway.key_sources.items()},
        "backends": {
            backend.name: {"ready": status.ready, "reason": status.reason, **status.detail}
            for backend in gateway.backends
            for status in [backend.status()]
        },
    }


@ray_serve_router.get("/stats", responses=problems(404))
async def show_ray_serve_stats(gateway: GatewayDep, _: Operator) -> dict[str, Any]:
    """Ray Serve's figures, per replica and in total."""
    figures = await replica_figures(gateway.backends)  # fresh: an operator who asks wants to know it now
    if figures is None:
        raise NotFound("Ray Serve is not configured: RAY_ADDRESS is empty")
    return figures


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problems(401, 403)})
async def show_metrics(gateway: GatewayDep, _: Scraper) -> Response:
    """Metrics for Prometheus."""
    if (figures := await gateway.replicas()) is not None:
        _show_replicas(gateway, figures.get("replicas", []))
    return Response(await gateway.scrape(), media_type=CONTENT_TYPE_LATEST)


async def replica_figures(backends: Iterable[Backend]) -> dict[str, Any] | None:
    """Ray Serve's own figures, or the plain word that there are none now: a scrape must not wait for a peer."""
    backend = next((backend for backend in backends if backend.name == RAY_SERVE), None)
    if backend is None:
        return None
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            return await backend.stats()
    except TimeoutError:
        return {"replicas": [], "missing": {backend.name: DeadlineExceeded.code}}


def _show_replicas(gateway: Gateway, rows: list[dict[str, Any]]) -> None:
    gpu_percent = {str(row["gpu_id"]): float(row["gpu_utilization_percent"]) for row in rows if "gpu_id" in row}
    rejecting = sum(bool(row.get("rejected")) for row in rows)
    gateway.metrics.arms.show_replicas(len(rows), gpu_percent, rejecting=rejecting)
