"""`sluice token`: who may ask the gateway."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.access import client_settings, known_scopes, mint
from app.cli.options import Models, Tenant


def token(
    sub: Annotated[str, typer.Option(help="Who the token is for.")],
    scope: Annotated[str, typer.Option(help="Scopes, separated by spaces: predict ops admin features.")] = "predict",
    ttl: Annotated[int, typer.Option(help="Seconds it is good for, at most 86400.", min=1, max=86400)] = 86400,
    tenant: Tenant = None,
    models: Models = None,
) -> None:
    """Print one token and nothing else."""
    known_scopes(scope)
    print(mint(client_settings(), sub, scope, ttl, tenant=tenant, models=None if models is None else models.split()))
