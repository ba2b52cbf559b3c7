"""The way from a command to a running gateway: its address, and a token that it takes."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from app import development
from app.cli.terminal import EX_CONFIG, fail, told
from app.environment import load_settings
from app.secret_files import read_secret_file
from app.settings import Settings

if TYPE_CHECKING:
    from app.client import GatewayClient

_DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_CREDENTIAL_CHARS = 8192
_STANDARD_INPUT = "-"
_CREDENTIAL = re.compile(r"[\x21-\x7e]+")


def client_settings() -> Settings:
    """The settings, with the development secret where no other is set and `make run` made one here."""
    settings = load_settings()
    if lacks_identity(settings) and development.SECRET_FILE.exists():
        return settings.with_overrides(jwt_secret_file=development.SECRET_FILE)
    return settings


def lacks_identity(settings: Settings) -> bool:
    """Whether nothing is set that tokens could be judged by."""
    return settings.jwt_secret is None and settings.jwt_secret_file is None and not settings.judges_by_public_keys


def gateway_client(settings: Settings, url: str | None, token: str | None, scope: str) -> GatewayClient:
    from app.client import GatewayClient

    first = token_for(settings, token, "operator", scope)  # what is wrong with it is told before anything is begun
    given = first if token else lambda: token_for(settings, None, "operator", scope)
    return told(lambda: GatewayClient(gateway_url(url), given))


def gateway_url(url: str | None) -> str:
    """The address given, that of the gateway which `make run` started here, or the default."""
    if url is not None:
        return url
    return development.URL_FILE.read_text() if development.URL_FILE.exists() else _DEFAULT_URL


def token_for(settings: Settings, token: str | None, subject: str, scope: str, lifetime_s: int = 60) -> str:
    token = mint(settings, subject, scope, lifetime_s) if not token else _given(token)
    if not _CREDENTIAL.fullmatch(token):
        fail("the token is none: it must be visible ASCII characters and nothing else")
    return token


def _given(token: str) -> str:
    """The token that `--token` names: itself, standard input, or a file that nobody else may read."""
    if token == _STANDARD_INPUT:
        return sys.stdin.read(_MAX_CREDENTIAL_CHARS).strip()
    if not token.startswith("@"):
        return token
    try:
        return read_secret_file(Path(token[1:]).expanduser()).decode("ascii", "replace")
    except ValueError as error:
        fail(str(error), EX_CONFIG)


def known_scopes(text: str) -> list[str]:
    """The scopes of an option; one that no route asks for is a slip, and told."""
    from app.auth import SCOPES

    if unknown := [scope for scope in text.split() if scope not in SCOPES]:
        fail(f"no route asks for the scope {unknown[0]!r:.40}; there are {', '.join(SCOPES)}", EX_CONFIG)
    return text.split()


def mint(
    settings: Settings,
    subject: str,
    scope: str,
    lifetime_s: int = 86400,
    *,
    tenant: str | None = None,
    models: list[str] | None = None,
) -> str:
    from app.auth import mint_token

    try:
        return mint_token(
            settings.signing_secret(),
            subject=subject,
            scopes=scope.split(),
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            lifetime_s=lifetime_s,
            now=time.time(),
            tenant=tenant,
            models=models,
        )
    except ValueError as error:
        fail(str(error))
