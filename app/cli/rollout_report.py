"""`sluice rollout report`: what the experiment has shown, as a table and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.cli.access import client_settings, gateway_url, token_for
from app.cli.options import AsJson, Token, Url
from app.cli.terminal import EX_CONFIG, fail, out, require_extra, save_picture, told

_TIMEOUT_S = 60.0  # a full log takes seconds to judge

_Figure = dict[str, Any]

# Figures of `app.rollout.experiment_report.Measures`: name, title, digits, shown in percent.
_FIGURES = (
    ("hit_rate", "hit rate, %", 1, True),
    ("log_loss", "log loss, nats", 3, False),
    ("brier", "Brier", 3, False),
    ("calibration_error", "calibration error, %", 1, True),
    ("coverage_90", "in 90 % interval, %", 1, True),
    ("rmse", "RMSE, volatilities", 3, False),
)


def rollout_report(
    since: Annotated[float, typer.Option(help="Seconds since the epoch; requests before do not count.", min=0)] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this PNG or SVG.")] = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show how well each arm's answers met what happened, with 95 % intervals."""
    if picture is not None:
        _require_place(picture)
    from app.client import GatewayClient

    given = token_for(client_settings(), token, "operator", "ops")
    with told(lambda: GatewayClient(gateway_url(url), given, timeout_s=_TIMEOUT_S)) as gateway:
        document = told(lambda: gateway.rollout_report(since))
    if as_json:
        print(json.dumps(document))
    else:
        out.print(render(document))
    if picture is not None:  # last, so that a disk that refuses it does not cost the report
        from app.rollout.experiment_picture import report_picture

        save_picture(picture, report_picture(document, picture.suffix[1:]))


def render(document: dict[str, Any]) -> Group:
    """The report for a terminal: a column for each side and arm."""
    arms = document["arms"]
    if not arms:
        return Group(Text("Nothing is logged: no experiment has run here, or none of its requests is left."))
    table = Table("", *(f"{arm['side']}: {arm['arm']}" for arm in arms))
    for name, title in (("requests", "requests"), ("labelled", "labelled windows"), ("callers", "their callers")):
        table.add_row(title, *(f"{arm['measures'][name]:,}" for arm in arms))
    for name, title, digits, in_percent in _FIGURES:
        table.add_row(title, *(_told(arm["measures"][name], digits, in_percent) for arm in arms))
    return Group(table, *_difference(document), *(Text(note, style="dim") for note in document["notes"]))


def _difference(document: dict[str, Any]) -> list[Text]:
    by_window = document["hit_rate_difference"]
    if by_window is None:
        return []
    by_caller = document["hit_rate_difference_by_caller"]
    return [
        Text("canary's hit rate less stable's, points:"),
        Text(f"  {_told(by_window, 1, True)} with windows as draws (Newcombe)"),
        Text(f"  {_told(by_caller, 1, True)} with callers as draws (bootstrap)"),
    ]


def _told(figure: _Figure | None, digits: int, in_percent: bool) -> str:
    if figure is None:
        return "–"
    scale = 100 if in_percent else 1
    value, low, high = (
        None if figure[name] is None else f"{scale * figure[name]:.{digits}f}" for name in ("value", "low", "high")
    )
    return f"{value} (no interval)" if low is None else f"{value} ({low} to {high})"


def _require_place(picture: Path) -> None:
    """Told before the report is asked for, not after."""
    require_extra("train", "a picture", "matplotlib")
    if picture.suffix not in {".png", ".svg"}:
        fail("the picture's name must end in .png or .svg", EX_CONFIG)
    if not picture.parent.is_dir():
        fail(f"there is no folder {picture.parent} for the picture", EX_CONFIG)
