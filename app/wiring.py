"""From the settings to the parts of one gateway: each room is built in one function, from plain arguments."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from app.api.deps import Gateway
from app.auth import Key, KeySet, TokenVerifier
from app.backends.base import Backend
from app.backends.in_process import InProcessBackend, RegistrySource
from app.backends.probe import Prober
from app.backends.ray_serve import RayServeBackend
from app.backends.remote import RemoteBackend
from app.drain import Drain
from app.observability.metrics import Metrics
from app.observability.statistics import InferenceStatistics
from app.rate_limit import Counters, RateLimiter, SlidingWindowLimiter
from app.rollout.dispatch import Dispatcher
from app.rollout.state import FileStore, Rollout, StateStore
from app.settings import ConfigError, SecretFile, Settings, read_secret_file


def wire(
    settings: Settings,
    *,
    backends: Sequence[Backend] | None,
    store: StateStore | None,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> Gateway:
    """Build every part; nothing is started.

    Args:
        settings: What the operator set.
        backends: Those to use instead of the settings' own.
        store: The one to use instead of the settings' own.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch.

    Raises:
        ConfigError: The settings leave nothing that can answer, no token secret, or a state folder that is no good.
    """
    sticky_key = _sticky_key(settings)
    arms = _arms(settings, clock) if backends is None else backends
    rollout = Rollout(
        FileStore(settings.state_dir) if store is None else store,
        initial_fraction=settings.ray_serve_fraction,
        wall_clock=wall_clock,
    )
    prober = Prober(arms, clock=clock, wall_clock=wall_clock)
    return Gateway(
        backends=arms,
        dispatcher=Dispatcher(arms, fraction=rollout.fraction, sticky_key=sticky_key, clock=clock),
        rollout=rollout,
        prober=prober,
        verifier=_verifier(settings, wall_clock),
        limiter=_limiter(settings, clock),
        metrics=Metrics(settings.multiproc_dir),
        statistics=InferenceStatistics(wall_clock),
        drain=Drain(),
        services=(*arms, prober),
        sticky_key=sticky_key,
        metrics_public=settings.metrics_public,
        model=settings.model,
        clock=clock,
        started_at=clock(),
    )


def _verifier(settings: Settings, wall_clock: Callable[[], float]) -> TokenVerifier:
    return TokenVerifier(
        KeySet({None: Key.hs256(settings.signing_secret())}),
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        wall_clock=wall_clock,
    )


def _limiter(settings: Settings, clock: Callable[[], float]) -> RateLimiter:
    return SlidingWindowLimiter(Counters(clock), limit=settings.rate_limit)


def _arms(settings: Settings, clock: Callable[[], float]) -> list[Backend]:
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
