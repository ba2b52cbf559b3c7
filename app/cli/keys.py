"""`sluice key`: API keys, for callers that cannot fetch a new token every day."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Table

from app.cli.access import known_scopes
from app.cli.options import AsJson, Models, Tenant
from app.cli.terminal import EX_CONFIG, err, fail, out
from app.environment import load_settings

if TYPE_CHECKING:
    from app.auth import ApiKeyFile
    from app.auth.api_keys import ApiKey

T = TypeVar("T")

commands = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke.")

_SECONDS_PER_DAY = 86400


@commands.command("create")
def key_create(
    sub: Annotated[str, typer.Option(help="Who the key is for.")],
    scope: Annotated[str, typer.Option(help="Scopes, separated by spaces: predict ops admin features.")] = "predict",
    days: Annotated[int | None, typer.Option(help="Days it is good for; default: no end.", min=1, max=3650)] = None,
    tenant: Tenant = None,
    models: Models = None,
) -> None:
    """Print one new key and nothing else; it is stored as a hash and cannot be shown again."""
    from app.auth import Principal, make_key, read_models

    scopes = frozenset(known_scopes(scope))

    def make(pepper: bytes) -> tuple[str, ApiKey]:
        principal = Principal(sub, tenant, scopes, None if models is None else read_models(models.split()))
        lifetime_s = None if days is None else days * _SECONDS_PER_DAY
        return make_key(principal, pepper, now=time.time(), lifetime_s=lifetime_s)

    print(_told(lambda: _file().add(make)))


@commands.command("list")
def key_list(as_json: AsJson = False) -> None:
    """Show every key but what proves it."""
    known = _told(lambda: _file().read())
    rows = [_row(key) for key in known.keys.values()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("id", "subject", "tenant", "scopes", "models", "created", "expires")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    out.print(table)


@commands.command("revoke")
def key_revoke(key_id: Annotated[str, typer.Argument(help="The eight characters behind gk_.")]) -> None:
    """Strike a key; running gateways refuse it within a second."""
    if not _told(lambda: _file().remove(key_id.removeprefix("gk_").partition("_")[0])):
        fail("there is no API key of that id; `sluice key list` shows them")
    err.print("revoked")


def _file() -> ApiKeyFile:
    from app.auth import ApiKeyFile

    return ApiKeyFile(*load_settings().api_key_paths())


def _row(key: ApiKey) -> dict[str, str | None]:
    principal = key.principal
    return {
        "id": key.id,
        "subject": principal.subject,
        "tenant": principal.tenant,
        "scopes": " ".join(sorted(principal.scopes)),
        "models": None if principal.models is None else " ".join(sorted(principal.models)),
        "created_at": _moment(key.created_at),
        "expires_at": None if key.expires_at is None else _moment(key.expires_at),
    }


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _told(work: Callable[[], T]) -> T:
    """What the work gives, or one plain line for what is known to go wrong with the table."""
    try:
        return work()
    except OSError as error:
        fail(f"cannot use {error.filename}: {error.strerror}", EX_CONFIG)
    except ValueError as error:
        fail(str(error), EX_CONFIG)
