"""`sluice predict`: one symbol of the shipped bars, asked of a running gateway."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated

import typer

from app.cli.access import client_settings, gateway_client
from app.cli.options import AsJson, Token, Url
from app.cli.terminal import fail, out, told


def predict(
    symbol: Annotated[str, typer.Option(help="AAPL, FB, GOOG, IBM or MSFT.")],
    on: Annotated[str | None, typer.Option("--date", help="Last day of the window, YYYY-MM-DD.")] = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Predict the day after a window of the shipped daily bars."""
    from app.symbol_report import ask, render
    from serve_app.bars import SYMBOLS

    if symbol not in SYMBOLS:
        fail(f"no bars of {symbol!r:.20}; there are {', '.join(SYMBOLS)}")
    try:
        until = date.fromisoformat(on) if on else None
    except ValueError:
        fail("--date must be YYYY-MM-DD")
    settings = client_settings()
    with gateway_client(settings, url, token, "predict") as gateway:
        report = told(lambda: ask(gateway, symbol, until, settings.registry_path))
    if as_json:
        print(json.dumps(report))
    else:
        out.print(render(report))
