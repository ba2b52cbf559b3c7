"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[str | None, typer.Option("--url", help="Root of the gateway; default: the one `make run` started.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="SLUICE_TOKEN",
        help="Bearer token: @FILE of mode 0600, or - for standard input. Given itself, every user of this machine can "
        "read it in the list of processes; not so SLUICE_TOKEN. Default: one made from the secret here.",
    ),
]
SignWith = Annotated[Path | None, typer.Option(help="Private key file to sign the version with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Tenant = Annotated[str | None, typer.Option(help="Whom they work for; limits are shared by a tenant.")]
Models = Annotated[str | None, typer.Option(help="The only models they may use, separated by spaces; default: all.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the audit log.")]
PlanFile = Annotated[Path | None, typer.Argument(metavar="PLAN", help="A plan as TOML, or JSON in a file named .json.")]
Profile = Annotated[str, typer.Option(help="Autoscaling profile.")]
Size = Annotated[str, typer.Option(help="Size of a replica: small, medium, large or local.")]
Engine = Annotated[str, typer.Option(help="Engine of the replicas.")]
Device = Annotated[str, typer.Option(help="Device of the replicas: cpu, cuda or cuda:N.")]
WaitS = Annotated[float, typer.Option(help="How long to wait until it runs.")]
