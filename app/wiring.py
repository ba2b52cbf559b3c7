"""From the settings to the parts of one gateway: each room is built in one function, from plain arguments."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from app.api.deps import Gateway, Service
from app.api.desk import Desk
from app.api.ops import replica_figures
from app.api.recent import Recent
from app.backends.base import Backend
from app.backends.breaker import Guarded
from app.backends.in_process import InProcessBackend, RegistrySource
from app.backends.probe import Prober
from app.backends.ray_serve import OnRetry, RayServeBackend
from app.backends.remote import RemoteBackend
from app.drain import Drain
from app.identity import Identity, build_identity
from app.observability.loop_lag import LoopLag
from app.observability.metrics import Metrics
from app.observability.statistics import InferenceStatistics
from app.rate_limit import Limits, Quota, RateLimiter
from app.rate_limit.concurrency import Concurrency
from app.rate_limit.memory import LocalLimiter, MinuteCounters
from app.rate_limit.shared import SharedCounters, SharedLimiter
from app.rollout.choice import hash_principal
from app.rollout.dispatch import Dispatcher
from app.rollout.state import StateStore
from app.rollout_parts import Arms, RolloutParts, build_rollout
from app.secret_files import SecretFile, read_secret_file, write_once
from app.settings import MAX_STICKY_KEY_BYTES, MIN_STICKY_KEY_BYTES, ConfigError, Settings
from app.shared.commands import Link

_REPLICAS_GOOD_S = 1.0  # scrapes and dashboards together ask them no more often


def wire(
    settings: Settings,
    *,
    backends: Sequence[Backend] | None,
    store: StateStore | None,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    waits_for_keys: bool = False,
) -> Gateway:
    """Build every part; nothing is started.

    Args:
        settings: What the operator set.
        backends: Those to use instead of the settings' own.
        store: The one to use instead of the settings' own.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch.
        waits_for_keys: Begin although a file of keys is damaged now.

    Raises:
        ConfigError: The settings leave nothing that can answer, no token secret, or a state folder that is no good.
    """
    metrics, drain, sticky_key = Metrics(settings.multiproc_dir), Drain(), _sticky_key(settings)
    backends = _arms(settings, on_retry=metrics.arms.count_retry, clock=clock) if backends is None else backends
    arms = _guarded(backends, metrics, clock)
    rolling = build_rollout(
        settings,
        _both_ways(backends, arms),
        store=store,
        metrics=metrics,
        link=lambda: redis_link(settings),
        is_leaving=lambda: drain.has_begun,
        clock=clock,
        wall_clock=wall_clock,
    )
    rooms = _Rooms(
        metrics=metrics,
        drain=drain,
        sticky_key=sticky_key,
        arms=arms,
        rolling=rolling,
        desk=Desk(rolling.experiment.log, clock=clock),
        identity=_identity(settings, metrics, clock, wall_clock, waits_for_keys=waits_for_keys),
        limiting=_limiting(settings, sticky_key, metrics, clock),
        prober=Prober(arms, clock=clock, wall_clock=wall_clock),
    )
    return _gateway(settings, rooms, clock, wall_clock)


def require_parts(settings: Settings) -> None:
    """Build the arms and the sticky key to see whether `wire` can: in a worker it is late to find that nothing will do.

    Raises:
        ConfigError: As `wire`.
    """
    _sticky_key(settings)
    _arms(settings, on_retry=lambda *, is_made: None, clock=time.monotonic)


class _Rooms(NamedTuple):
    """What a gateway is put together from, each built from its own settings."""

    metrics: Metrics
    drain: Drain
    sticky_key: bytes
    arms: Sequence[Guarded]
    rolling: RolloutParts
    desk: Desk
    identity: Identity
    limiting: _Limiting
    prober: Prober


def _gateway(settings: Settings, rooms: _Rooms, clock: Callable[[], float], wall_clock: Callable[[], float]) -> Gateway:
    arms, rolling, metrics = rooms.arms, rooms.rolling, rooms.metrics
    return Gateway(
        backends=arms,
        dispatcher=Dispatcher(
            arms,
            record=lambda: rolling.rollout.record,
            sticky_key=rooms.sticky_key,
            witness=rolling.witness,
            clock=clock,
        ),
        rollout=rolling.rollout,
        controller=rolling.controller,
        kills=rolling.kills,
        trial=rolling.trial,
        experiment=rolling.experiment,
        desk=rooms.desk,
        audit=rolling.audit,
        prober=rooms.prober,
        replicas=Recent(partial(replica_figures, arms), keep_s=_REPLICAS_GOOD_S, clock=clock),
        scrape=Recent(metrics.scrape, keep_s=0.0, clock=clock),
        door=rooms.identity.door,
        key_sources=rooms.identity.sources,
        limits=rooms.limiting.limits,
        metrics=metrics,
        statistics=InferenceStatistics(wall_clock),
        drain=rooms.drain,
        services=_services(rooms, clock),
        sticky_key=rooms.sticky_key,
        metrics_public=settings.metrics_public,
        model=settings.model,
        clock=clock,
        wall_clock=wall_clock,
        started_at=clock(),
    )


def _services(rooms: _Rooms, clock: Callable[[], float]) -> Sequence[Service]:
    """What runs while the gateway serves, in the order in which it starts; what asks the arms ends before they do."""
    rolling = rooms.rolling

    def observe_lag(seconds: float) -> None:
        rooms.metrics.http.observe_loop_lag(seconds)
        rolling.shadow.observe_lag(seconds)

    return (
        LoopLag(observe_lag, clock=clock),
        *rolling.services,
        rooms.desk,
        *rooms.limiting.services,
        *rooms.identity.sources.values(),
        *rooms.arms,
        rolling.shadow,
        rooms.prober,
    )


def _both_ways(backends: Sequence[Backend], guarded: Sequence[Guarded]) -> Arms:
    by_name = {arm.name: arm for arm in guarded}
    return Arms({arm.name: arm for arm in backends}, lambda arm: by_name[arm.backend].is_ready(arm.version))


def _guarded(arms: Sequence[Backend], metrics: Metrics, clock: Callable[[], float]) -> list[Guarded]:
    return [Guarded(arm, clock=clock, on_change=metrics.arms.show_breaker) for arm in arms]


def _identity(
    settings: Settings,
    metrics: Metrics,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    *,
    waits_for_keys: bool,
) -> Identity:
    return build_identity(
        settings,
        count_failure=metrics.access.count_failure,
        count_reload=metrics.access.count_reload,
        clock=clock,
        wall_clock=wall_clock,
        waits_for_files=waits_for_keys,
    )


class _Limiting(NamedTuple):
    """The limits, and what they need while the gateway serves."""

    limits: Limits
    services: Sequence[Service]


def _limiting(settings: Settings, sticky_key: bytes, metrics: Metrics, clock: Callable[[], float]) -> _Limiting:
    local = MinuteCounters(clock)
    concurrency = Concurrency(max(1, settings.max_concurrent // settings.workers))
    own = {hash_principal(sticky_key, account): limit for account, limit in settings.rate_limits.items()}
    predict, ops = Quota(settings.rate_limit, own), Quota(settings.ops_rate_limit)
    link = redis_link(settings)
    if link is None:
        by_windows = LocalLimiter(local, quota=predict, policy="predict")
        return _Limiting(Limits(by_windows, LocalLimiter(local, quota=ops, policy="ops"), concurrency), ())
    shared = SharedCounters(link, on_change=metrics.access.show_limits_local, clock=clock)

    def limiter(policy: str, quota: Quota) -> RateLimiter:
        part = quota.divided(settings.workers * settings.instances)
        alone = LocalLimiter(local, quota=part, policy=policy, mode="local")
        return SharedLimiter(shared, alone, quota=quota, policy=policy, clock=clock)

    return _Limiting(Limits(limiter("predict", predict), limiter("ops", ops), concurrency), (shared,))


def redis_link(settings: Settings) -> Link | None:
    """A connection of its own to the shared Redis; None where there is none."""
    address = settings.redis_address()
    if address is None:
        return None
    from app.shared.link import RedisLink  # noqa: PLC0415  # a gateway without Redis need not wait for its library

    password = None if settings.redis_password_file is None else SecretFile(settings.redis_password_file)
    ca_file = None if settings.redis_ca_file is None else str(settings.redis_ca_file)
    return RedisLink(address, password=password, ca_file=ca_file)


def _arms(settings: Settings, *, on_retry: OnRetry, clock: Callable[[], float]) -> list[Backend]:
    backends: list[Backend] = []
    if settings.ray_address is not None:
        backends.append(_ray_serve(settings.ray_address, settings, on_retry, clock))
    if settings.legacy == "in_process":
        backends.append(_in_process(settings, clock))
    if settings.legacy == "remote":
        backends.append(_remote(settings, clock))
    if not backends:
        raise ConfigError("nothing can answer: set RAY_ADDRESS, or GATEWAY_LEGACY=in_process")
    return backends


def _ray_serve(address: str, settings: Settings, on_retry: OnRetry, clock: Callable[[], float]) -> RayServeBackend:
    try:
        return RayServeBackend(address, max_wait_s=settings.max_wait_ms / 1e3, on_retry=on_retry, clock=clock)
    except ValueError as error:
        raise ConfigError(f"RAY_ADDRESS: {error}") from error


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
        fault_file=settings.fault_file,
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
        write_once(path, secrets.token_hex(32).encode())
        key = read_secret_file(path)
    except OSError as error:
        raise ConfigError(f"cannot keep state in {settings.state_dir}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not MIN_STICKY_KEY_BYTES <= len(key) <= MAX_STICKY_KEY_BYTES:
        raise ConfigError(
            f"{path} must have {MIN_STICKY_KEY_BYTES} to {MAX_STICKY_KEY_BYTES} bytes; delete it for a new one"
        )
    return key
