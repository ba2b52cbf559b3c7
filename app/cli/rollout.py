"""`sluice rollout`: the share of callers that Ray Serve answers."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from app.cli.access import client_settings, gateway_client
from app.cli.audit import rollout_verify
from app.cli.options import AsJson, Token, Url
from app.cli.rollout_report import rollout_report
from app.cli.terminal import out, told

commands = typer.Typer(no_args_is_help=True, help="The share of callers that Ray Serve answers.")
commands.command("report")(rollout_report)
commands.command("verify")(rollout_verify)


@commands.command("show")
def rollout_show(url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show the share in force."""
    with gateway_client(client_settings(), url, token, "ops") as gateway:
        _print_rollout(told(gateway.rollout), as_json)


@commands.command("set")
def rollout_set(
    fraction: Annotated[float, typer.Argument(help="Share of callers whom Ray Serve answers.", min=0, max=1)],
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Change the share; 0 sends everybody back to legacy."""
    with gateway_client(client_settings(), url, token, "ops admin") as gateway:
        _print_rollout(told(lambda: gateway.set_fraction(fraction)), as_json)


def _print_rollout(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document))
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(document["changed_at"]))
    out.print(f"ray_serve {document['ray_serve_fraction']:.2%}, set by {document['changed_by']} on {when}")
