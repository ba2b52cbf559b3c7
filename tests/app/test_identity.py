from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from app.auth import Principal, make_key, mint_token
from app.auth.api_key_file import ApiKeyFile
from app.auth.file_source import POLL_S
from app.errors import IdentityUnavailable, TooManyFailures, Unauthenticated
from app.identity import Identity, build_identity
from app.observability.ledger import Ledger
from app.settings import ConfigError, Settings
from tests.app.auth.signing import ec_key, jwks, public_jwk, sign_with


def identity_of(settings: Settings, *, waits_for_files: bool = False) -> Identity:
    return build_identity(
        settings,
        count_failure=lambda _: None,
        count_reload=lambda *_: None,
        clock=lambda: 0.0,
        wall_clock=time.time,
        waits_for_files=waits_for_files,
    )


async def admitted(identity: Identity, credential: str) -> Principal:
    scope = {"type": "http", "headers": [(b"authorization", f"Bearer {credential}".encode())]}
    Ledger(lambda: 0.0).open(scope)
    return await identity.door.admit(scope)


@pytest.mark.parametrize(("workers", "per_minute", "each"), [(1, 10, 10), (2, 10, 5), (4, 10, 2), (16, 10, 1)])
async def test_failures_that_an_address_may_make_are_shared_by_the_workers(
    settings: Settings, workers: int, per_minute: int, each: int
) -> None:
    changed = settings.with_overrides(redis_url="redis://cache", workers=workers, auth_failures_per_min=per_minute)
    door = identity_of(changed).door
    refusals: list[type[Exception]] = []
    for _ in range(12):
        scope = {"type": "http", "headers": [(b"authorization", b"Bearer x")], "client": ("192.0.2.1", 1)}
        Ledger(lambda: 0.0).open(scope)
        with pytest.raises((Unauthenticated, TooManyFailures)) as caught:
            await door.admit(scope)
        refusals.append(caught.type)
    assert refusals == [Unauthenticated] * each + [TooManyFailures] * (12 - each)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files that identity rests on, each of them good."""
    jwks_file, denied = tmp_path / "jwks.json", tmp_path / "denied"
    jwks_file.write_bytes(jwks(public_jwk(ec_key(), "k")))
    denied.write_text("leaked\n")
    for path in (jwks_file, denied):
        path.chmod(0o644)
    return {"jwt_jwks_file": jwks_file, "jwt_denied_file": denied}


def token_now(**claims: object) -> str:
    now = int(time.time())
    said = {"iss": "sluice", "aud": "sluice", "sub": "desk", "iat": now, "exp": now + 60, "scope": "predict", **claims}
    return sign_with(ec_key(), {"alg": "ES256", "kid": "k"}, said)


@pytest.mark.parametrize("damaged", ["jwt_jwks_file", "jwt_denied_file", "api_keys_file"])
async def test_who_takes_a_dead_worker_s_place_waits_for_a_damaged_file_and_says_no_untrue_word(
    settings: Settings, files: dict[str, Path], damaged: str, tmp_path: Path
) -> None:
    table = tmp_path / "api_keys.json"
    changed = settings.model_copy(update={"jwt_secret": None, "api_keys_file": table, **files})
    key_file = ApiKeyFile(*changed.api_key_paths())
    api_key = key_file.add(lambda pepper: make_key(Principal("a"), pepper, now=time.time(), lifetime_s=None))
    path = {**files, "api_keys_file": table}[damaged]
    good, mode = path.read_bytes(), path.stat().st_mode
    path.write_bytes(good[:-3] + b"\xff")
    with pytest.raises(ConfigError, match=str(path)):
        identity_of(changed)
    identity = identity_of(changed, waits_for_files=True)
    judged, unjudged = (api_key, token_now()) if damaged != "api_keys_file" else (token_now(), api_key)
    await admitted(identity, judged)
    with pytest.raises(IdentityUnavailable):
        await admitted(identity, unjudged)
    for source in identity.sources.values():
        await source.start()
    path.write_bytes(good)
    path.chmod(mode)
    await asyncio.sleep(3 * POLL_S)
    await admitted(identity, unjudged)
    with pytest.raises(Unauthenticated):
        await admitted(identity, token_now(jti="leaked"))
    for source in identity.sources.values():
        await source.stop()


async def test_a_denied_token_of_the_shared_secret_is_refused_too(settings: Settings, files: dict[str, Path]) -> None:
    changed = settings.with_overrides(jwt_denied_file=files["jwt_denied_file"])
    identity = identity_of(changed)
    assert identity.sources["denied"].document()["keys"] == 1
    said = {"subject": "a", "scopes": ["predict"], "issuer": "sluice", "audience": "sluice", "lifetime_s": 60}
    token = mint_token(changed.signing_secret(), **said, now=time.time())
    await admitted(identity, token)
