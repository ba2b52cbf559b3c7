"""`sluice bench`: a load test of what runs, with a verdict as exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from app import development
from app.cli.access import client_settings, gateway_url, token_for
from app.cli.options import AsJson, Token, Url
from app.cli.terminal import EX_CONFIG, err, fail, out, require_extra, save_picture
from app.settings import Settings


def bench(
    requests: Annotated[int | None, typer.Option(help="How many; default 1000, or the duration's.", min=1)] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Callers, each with one request at a time; default 10, with --rate 64.", min=1)
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests due per second, answered or not.", min=0.01)] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds in which requests are due.", min=0.01)] = None,
    target: Annotated[Literal["http", "handle"], typer.Option(help="The gateway, or the deployment alone.")] = "http",
    windows: Annotated[int, typer.Option(help="Windows per request.", min=1, max=1024)] = 1,
    body: Annotated[Literal["binary", "json"], typer.Option(help="How they travel over HTTP.")] = "binary",
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.", min=0.001)] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.", min=0)] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw the latencies into this PNG.")] = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Load-test what runs: exit code 0 when average, p95 and p99 are under 100 ms and nothing failed."""
    if picture is not None:
        _require_place(picture)
    from app.bench.inputs import draw_windows
    from app.bench.load import NoTarget, Plan
    from app.bench.report import render
    from app.bench.run import run
    from app.bench.targets import HandleTarget, HttpTarget

    callers = concurrency or (10 if rate is None else 64)
    plan = Plan(requests if requests or duration else 1000, duration, callers, rate, timeout)
    settings = client_settings()
    inputs = draw_windows(64, windows, seed)
    try:
        asked: HttpTarget | HandleTarget
        if target == "http":
            bearer = token_for(settings, token, "bench", "predict", 86400)
            asked = HttpTarget(gateway_url(url), bearer, inputs, body=body, timeout_s=timeout)
        else:
            address, environment = _ray_to_join(settings)
            asked = HandleTarget(address, inputs, environment=environment, concurrency=callers, timeout_s=timeout)
        report, samples = run(asked, plan, body=body, windows_per_request=windows, seed=seed, console=err)
    except NoTarget as error:
        fail(str(error))
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        out.print(render(report, samples))
    if picture is not None:
        from app.bench.picture import latency_picture

        save_picture(picture, latency_picture(report, samples))
    sys.exit(0 if report.meets_requirements else 1)


def _require_place(picture: Path) -> None:
    """Told before the load, not after it."""
    require_extra("train", "a picture", "matplotlib")
    if not picture.parent.is_dir():
        fail(f"there is no folder {picture.parent} for the picture", EX_CONFIG)


def _ray_to_join(settings: Settings) -> tuple[str, dict[str, str]]:
    """Address of the Ray cluster, and what a driver needs to join it: the settings', or `sluice serve --local`'s."""
    if settings.ray_address is not None:
        return settings.ray_address, {}
    try:
        environment = json.loads(development.RAY_FILE.read_text())
    except OSError:
        fail("no Ray to join: set RAY_ADDRESS, or run `sluice serve --local` in this folder", EX_CONFIG)
    return environment["RAY_ADDRESS"], environment
