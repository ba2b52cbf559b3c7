"""`sluice kill`: predictions are refused from now on, or no longer."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.table import Table

from app.cli.access import client_settings, gateway_client
from app.cli.options import AsJson, Token, Url
from app.cli.terminal import fail, out, told

_USAGE = 2


def kill(
    everything: Annotated[bool, typer.Option("--global", help="All predictions.")] = False,
    model: Annotated[str | None, typer.Option(help="Those of a model.")] = None,
    principal: Annotated[
        str | None, typer.Option(help="Those of an account: sub:NAME, sub:TENANT/NAME or tenant:NAME.")
    ] = None,
    symbol: Annotated[str | None, typer.Option(help="Those whose X-Symbol says so.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept, and shown to operators.")] = None,
    lift: Annotated[bool, typer.Option("--lift", help="Answer them again.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show what is killed.")] = False,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Refuse predictions at once, in every worker of every gateway, until that is lifted."""
    names = {"global": "" if everything else None, "model": model, "principal": principal, "symbol": symbol}
    given = [(scope, name) for scope, name in names.items() if name is not None]
    if listing:
        if given or lift:
            fail("--list stands alone", _USAGE)
        _show(url, token, as_json)
        return
    if len(given) != 1:
        fail("say what: one of --global, --model, --principal, --symbol", _USAGE)
    if reason is None and not lift:
        fail("say why: --reason TEXT", _USAGE)
    [(scope, name)] = given
    _change({"scope": scope, "name": name, "killed": not lift, "reason": reason or "lifted"}, url, token, as_json)


def _change(wish: dict[str, Any], url: str | None, token: str | None, as_json: bool) -> None:
    with gateway_client(client_settings(), url, token, "ops admin") as gateway:
        done = told(lambda: gateway.change_kill(wish))
    if as_json:
        print(json.dumps(done))
        return
    what = "killed" if done["entry"]["killed"] else "lifted"
    kept = "" if done["kept"] else "; this gateway's disk does not keep it"
    out.print(f"{what} {_named(done['entry'])} in {done['reached']}{kept}", markup=False, highlight=False)


def _show(url: str | None, token: str | None, as_json: bool) -> None:
    with gateway_client(client_settings(), url, token, "ops") as gateway:
        document = told(gateway.kills)
    if as_json:
        print(json.dumps(document))
        return
    if document["blind"]:
        out.print("this worker cannot tell what is killed and refuses everything; its log says why")
    if not document["killed"]:
        out.print("nothing is killed")
        return
    table = Table("what", "by", "at", "why")
    for entry in document["killed"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["at"]))
        table.add_row(*map(_plain, (_named(entry), entry["actor"], when, entry["reason"])))
    out.print(table)


def _named(entry: dict[str, Any]) -> str:
    return f"{entry['scope']} {entry['name']}".rstrip()


def _plain(text: str) -> str:
    """As it is: operators' words are no markup."""
    return text.replace("[", "\\[")
