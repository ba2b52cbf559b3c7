"""What routes are given: the gateway's parts, and the principal that a route's scope asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from app.api import docs
from app.api.desk import Desk
from app.api.recent import Recent
from app.auth import Door, Principal
from app.backends.base import Backend
from app.backends.probe import Prober
from app.drain import Drain
from app.errors import Forbidden, RateLimited
from app.observability.metrics import Metrics
from app.observability.statistics import InferenceStatistics
from app.rate_limit import Allowance, Limits, RateLimiter
from app.rollout.audit import AuditLog
from app.rollout.choice import hash_principal
from app.rollout.controller import Controller
from app.rollout.dispatch import Dispatcher
from app.rollout.experiment import Experiment
from app.rollout.kill import KillSwitch
from app.rollout.rollout import Rollout
from app.rollout.trial import Trial
from serve_app.contract import ModelNotFound

# The routes that answer without a token; every other one names a scope. `/metrics` joins them by setting.
PUBLIC_PATHS = docs.PATHS | {"/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}

BEARER = HTTPBearer(auto_error=False, description="A token or API key with the scope that the route names.")


class Service(Protocol):
    """What runs while the gateway serves."""

    async def start(self) -> None:
        """Begin, and return quickly whatever the peers do."""

    async def stop(self) -> None:
        """End, and give back what was taken."""


class KeySource(Service, Protocol):
    """Where new keys come from while the gateway serves."""

    def document(self) -> dict[str, Any]:
        """What it gave last, for `/stats`."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of one gateway, put together by `app.wiring.wire`; routes find it as `app.state.gateway`.

    Attributes:
        replicas: Ray Serve's own figures, of this second; None where it is not configured.
        scrape: The metrics of now, over all workers; one reading at a time.
        services: Parts to start with the gateway, in this order, and to stop in the reverse one.
    """

    backends: Sequence[Backend]
    dispatcher: Dispatcher
    rollout: Rollout
    controller: Controller
    kills: KillSwitch
    trial: Trial
    experiment: Experiment
    desk: Desk
    audit: AuditLog
    prober: Prober
    replicas: Recent[dict[str, Any] | None]
    scrape: Recent[bytes]
    door: Door
    limits: Limits
    metrics: Metrics
    statistics: InferenceStatistics
    key_sources: Mapping[str, KeySource]
    drain: Drain
    services: Sequence[Service]
    sticky_key: bytes
    metrics_public: bool
    model: str
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    started_at: float


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def require_scope(principal: Principal, scope: str) -> None:
    """Raises `Forbidden` where the principal's token does not hold the scope."""
    if scope not in principal.scopes:
        raise Forbidden(
            f"this needs a token with the scope {scope}",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
        )


def require_model(principal: Principal, model: str) -> None:
    """Raises `ModelNotFound` where the principal has a list of models and this is none of them.

    For whom a model is not meant it does not exist: the answer is that of a name that nobody has.
    """
    if not principal.may_use(model):
        raise ModelNotFound("no such model")


async def spend(limiter: RateLimiter, metrics: Metrics, account: str, cost: int) -> Allowance:
    """Count `cost` against the account. Raises `RateLimited`."""
    allowance = await limiter.spend(account, cost)
    metrics.access.count_allowance(allowance.policy, allowance.mode, allowance.admitted)
    if allowance.admitted:
        return allowance
    unit = "windows" if allowance.policy == "predict" else "requests"
    raise RateLimited(
        f"{allowance.limit} {unit} per {allowance.window_s} seconds are your limit",
        headers={**allowance.headers(), "Retry-After": str(allowance.reset_s)},
        members={"violated-policies": [allowance.policy]},
    )


async def _admit(request: Request, gateway: Gateway, scopes: Sequence[str]) -> Principal:
    """Who asks, where that may be asked by them and so often. Raises `Unauthenticated`, `Forbidden`, `RateLimited`."""
    principal = await gateway.door.admit(request.scope)
    for scope in scopes:
        require_scope(principal, scope)
    # Moves count apart: whoever looks and looks must not keep anybody from a kill or a way back.
    account = hash_principal(
        gateway.sticky_key, f"{principal.account}\nadmin" if "admin" in scopes else principal.account
    )
    await spend(gateway.limits.ops, gateway.metrics, account, 1)
    return principal


async def _authorize(
    request: Request,
    gateway: Annotated[Gateway, Depends(gateway_of)],
    scopes: SecurityScopes,
    _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)],  # shows the scheme in OpenAPI
) -> Principal:
    return await _admit(request, gateway, scopes.scopes)


async def _authorize_scrape(request: Request, gateway: Annotated[Gateway, Depends(gateway_of)]) -> None:
    if not gateway.metrics_public:
        await _admit(request, gateway, ["ops"])


GatewayDep = Annotated[Gateway, Depends(gateway_of)]
Predictor = Annotated[Principal, Security(_authorize, scopes=["predict"])]
Operator = Annotated[Principal, Security(_authorize, scopes=["ops"])]
Admin = Annotated[Principal, Security(_authorize, scopes=["admin"])]
Scraper = Annotated[None, Depends(_authorize_scrape)]
