"""`sluice deploy`: the deployment onto a Ray cluster."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.access import client_settings
from app.cli.registry import registry_of
from app.cli.terminal import EX_CONFIG, err, fail, told
from app.settings import Settings

if TYPE_CHECKING:
    from serve_app.serve_config import ServedModel


def deploy(
    profile: Annotated[str, typer.Option(help="Autoscaling profile.")] = "local",
    size: Annotated[str, typer.Option(help="Size of a replica: small, medium, large or local.")] = "local",
    version: Annotated[str, typer.Option(help="Version or alias.")] = "latest",
    engine: Annotated[str, typer.Option(help="Engine of the replicas.")] = "torch",
    device: Annotated[str, typer.Option(help="Device of the replicas: cpu, cuda or cuda:N.")] = "cpu",
    exact: Annotated[bool, typer.Option("--exact", help="Answer bits that do not depend on batch mates.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the Serve configuration, deploy nothing.")] = False,
    wait_s: Annotated[float, typer.Option(help="How long to wait until it runs.")] = 300.0,
) -> None:
    """Put the deployment onto the Ray cluster; other applications there stay as they are."""
    from pydantic import ValidationError

    from app.serve_api import DeployFailed, ServeApi
    from serve_app.serve_config import ServedApplication, build_config

    settings = client_settings()
    try:
        application = ServedApplication.model_validate(
            {"profile": profile, "size": size, "serves": served_model(settings, version, engine, device, exact)}
        )
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        fail(f"{fault['loc'][-1]}: {fault['msg']}", EX_CONFIG)
    try:
        config = build_config(application)
    except ValueError as error:
        fail(str(error), EX_CONFIG)
    if dry_run:
        print(json.dumps(config, indent=2))
        return
    try:
        with ServeApi(settings.ray_dashboard_url, token=settings.ray_auth_token()) as api:
            api.put(config)
            api.wait_running(application.name, timeout_s=wait_s, on_progress=err.print, clock=time.monotonic)
    except DeployFailed as error:
        fail(str(error))


def served_model(
    settings: Settings, version: str, engine: str, device: str = "cpu", exact: bool = False
) -> ServedModel:
    """What the replicas shall serve, with an alias pinned to the version that it stands for now.

    A replica resolves an alias when it loads it, so two of them could serve two versions under one name.
    """
    from serve_app.serve_config import ServedModel

    version = told(lambda: registry_of(settings).resolve(settings.model, version))
    return ServedModel.model_validate(
        {
            "registry_path": str(settings.registry_path.resolve()),
            "model": settings.model,
            "version": version,
            "engine": engine,
            "device": device,
            "exact": exact,
            "fault_file": fault_file_of(settings, engine),
            "registry_key_path": settings.registry_key_file and str(settings.registry_key_file),
        }
    )


def fault_file_of(settings: Settings, engine: str) -> str | None:
    """What the engine that fails on purpose is told by, None for every other engine."""
    from serve_app.serve_config import FAULT_ENGINE

    if engine != FAULT_ENGINE:
        return None
    if settings.prod:
        fail(f"with PROD=1 there is no engine {FAULT_ENGINE}", EX_CONFIG)
    if settings.fault_file is None:
        fail(f"the engine {FAULT_ENGINE} needs GATEWAY_FAULT_FILE", EX_CONFIG)
    return str(settings.fault_file.resolve())
