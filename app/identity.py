"""From the settings to the door: for the gateway, and for commands that check beforehand whether it would start."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from app.auth import (
    ApiKeyFile,
    ApiKeyReloader,
    ApiKeyVerifier,
    DeniedFile,
    Door,
    FailureLimit,
    Key,
    KeyFile,
    KeySet,
    KeyUrl,
    TokenVerifier,
)
from app.settings import ConfigError, Settings

CountReload = Callable[[str, str, int], None]


FileOfKeys = KeyFile | ApiKeyReloader | DeniedFile


class Identity(NamedTuple):
    """The door, and the sources from which it learns new keys, by what they are keys of."""

    door: Door
    sources: dict[str, FileOfKeys | KeyUrl]


def build_identity(
    settings: Settings,
    *,
    count_failure: Callable[[str], None],
    count_reload: CountReload,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    waits_for_files: bool = False,
) -> Identity:
    """The door, with the keys that files hold now; nothing is started and no URL asked.

    Args:
        settings: What the operator set.
        count_failure: Told the reason of every credential that did not count.
        count_reload: Told every set of keys: of what, `taken` or `refused`, and how many are in force.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch.
        waits_for_files: Take a file that is not what it must be for one that will be: until then, what it would judge
            cannot be judged.

    Raises:
        ConfigError: No secret and no keys, or a file that is not what it must be; the message holds none of them.
    """
    keys = None if settings.judges_by_public_keys else KeySet({None: _shared_secret(settings)})
    tokens = TokenVerifier(keys, issuer=settings.jwt_issuer, audience=settings.jwt_audience, wall_clock=wall_clock)
    token_source = build_token_source(settings, tokens.replace_keys, count_reload, clock)
    api_keys = ApiKeyVerifier(wall_clock)
    sources: dict[str, FileOfKeys | KeyUrl] = {
        "api_keys": ApiKeyReloader(ApiKeyFile(*settings.api_key_paths()), api_keys.replace, count_reload)
    }
    if token_source is not None:
        sources["tokens"] = token_source
    if settings.jwt_denied_file is not None:
        sources["denied"] = DeniedFile(settings.jwt_denied_file, tokens.replace_denied, count_reload)
    forget: dict[str, Callable[[None], None]] = {
        "api_keys": api_keys.replace,
        "denied": tokens.replace_denied,
        "tokens": tokens.replace_keys,
    }
    for what, source in sources.items():
        if not isinstance(source, KeyUrl):
            _load(source, orelse=partial(forget[what], None) if waits_for_files else None)
    door = Door(
        tokens,
        api_keys,
        limit=FailureLimit(max(1, settings.auth_failures_per_min // settings.workers), clock=clock),  # each has its own
        count_failure=count_failure,
        renew=None if token_source is None else token_source.renew,
    )
    return Identity(door, sources)


def require_identity(settings: Settings) -> Identity:
    """What the gateway will judge by, built to see whether it can. Raises as `build_identity`."""
    return build_identity(
        settings,
        count_failure=lambda _: None,
        count_reload=lambda *_: None,
        clock=time.monotonic,
        wall_clock=time.time,
    )


def _shared_secret(settings: Settings) -> Key:
    try:
        return Key.hs256(settings.signing_secret())
    except ValueError as error:
        raise ConfigError(f"the token secret: {error}") from error


def build_token_source(
    settings: Settings, take: Callable[[KeySet | None], None], count_reload: CountReload, clock: Callable[[], float]
) -> KeyFile | KeyUrl | None:
    """Where the public keys of tokens come from, nothing read yet; None where a secret judges them.

    Args:
        settings: What the operator set.
        take: Told every new set, and None when there is none any more.
        count_reload: As in `build_identity`.
        clock: Monotonic seconds.

    Raises:
        ConfigError: As `build_identity`.
    """
    if settings.jwt_jwks_file is not None:
        return KeyFile(settings.jwt_jwks_file, take, count_reload)
    if settings.jwt_jwks_url is None:
        return None
    try:
        tls = ssl.create_default_context(cafile=settings.jwt_jwks_ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"GATEWAY_JWT_JWKS_CA_FILE: no certificates in {settings.jwt_jwks_ca_file}") from error
    return KeyUrl(
        settings.jwt_jwks_url,
        take,
        count_reload,
        refresh_s=settings.jwt_jwks_refresh_s,
        max_age_s=settings.jwt_jwks_max_age_s,
        tls=tls,
        clock=clock,
    )


def load_file(source: FileOfKeys) -> None:
    """Read a source's file for the first time. Raises `ConfigError` where it is not what it must be."""
    try:
        source.load()
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{source.path}: {error}") from error


def _load(source: FileOfKeys, *, orelse: Callable[[], None] | None) -> None:
    try:
        load_file(source)
    except ConfigError as error:
        if orelse is None:
            raise
        orelse()
        source.note_fault(str(error))
