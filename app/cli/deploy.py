"""`sluice deploy`: the deployment onto a Ray cluster."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.access import client_settings, gateway_client
from app.cli.registry import registry_of
from app.cli.terminal import EX_CONFIG, err, fail
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
    _require_loadable(application.serves)
    try:
        with ServeApi(settings.ray_dashboard_url, token=settings.ray_auth_token()) as api:
            standby = _standby(api.application(application.name), application.serves)
            serves = application.serves.model_copy(update={"standby": standby})
            api.put(build_config(application.model_copy(update={"serves": serves})))
            api.wait_running(application.name, timeout_s=wait_s, on_progress=err.print, clock=time.monotonic)
    except DeployFailed as error:
        fail(str(error))
    _tell_rejection(settings, application.serves.version)


def _require_loadable(serves: ServedModel) -> None:
    """Refuse here what every replica would refuse: Serve would take it for served, while they kept what they have."""
    from pathlib import Path

    from serve_app.engine import load_engine
    from serve_app.registry import RegistryError, open_registry
    from serve_app.serve_config import STUB_ENGINES
    from serve_app.signing import KeyRefused

    if serves.engine in STUB_ENGINES:
        return
    key_file = None if serves.registry_key_path is None else Path(serves.registry_key_path)
    try:
        load_engine(open_registry(Path(serves.registry_path), key_file=key_file).load(serves.model, serves.version))
    except (RegistryError, KeyRefused) as error:
        fail(f"{serves.model} {serves.version} in {serves.registry_path}: {error}", EX_CONFIG)


def _standby(running: dict[str, Any], serves: ServedModel) -> str | None:
    """The version that replicas fall back to: the one that the application was told to serve so far, if it was good."""
    from pathlib import Path

    from serve_app.registry import RegistryError, open_registry
    from serve_app.signing import KeyRefused

    key_file = None if serves.registry_key_path is None else Path(serves.registry_key_path)
    for deployment in running.get("deployments", {}).values():
        so_far = (deployment.get("deployment_config") or {}).get("user_config") or {}
        for version in (so_far.get("version"), so_far.get("standby")):
            try:
                if version and version != serves.version and so_far.get("model") == serves.model:
                    open_registry(Path(serves.registry_path), key_file=key_file).verify(serves.model, version)
                    return str(version)
            except (RegistryError, KeyRefused):
                continue
    return None


def _tell_rejection(settings: Settings, version: str) -> None:
    """Fail where the gateway that is here knows of replicas that refused the version: Serve does not tell."""
    from app.client import GatewayRefused

    if settings.jwt_secret is None and settings.jwt_secret_file is None:
        err.print("no JWT secret here: the gateway was not asked whether replicas refused the version")
        return
    try:
        with gateway_client(settings, None, None, "ops") as gateway:
            rejected = gateway.ray_serve_stats()["rejected"]
    except (GatewayRefused, KeyError):
        return  # there is none, or it has no Ray
    for row in rejected:
        if row["version"] == version:
            fail(f"{row['replicas']} replicas refused version {version} and serve what they had: {row['reason']}")


def served_model(
    settings: Settings, version: str, engine: str, device: str = "cpu", exact: bool = False
) -> ServedModel:
    """What the replicas shall serve, with an alias pinned to the version that it stands for now.

    A replica resolves an alias when it loads it, so two of them could serve two versions under one name.
    """
    from serve_app.serve_config import ServedModel

    version = _known(settings, version)
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


def _known(settings: Settings, version: str) -> str:
    from serve_app.registry import RegistryError
    from serve_app.signing import KeyRefused

    try:
        return registry_of(settings).resolve(settings.model, version)
    except (RegistryError, KeyRefused) as error:
        fail(f"{settings.model} {version} in {settings.registry_path}: {error}", EX_CONFIG)


def fault_file_of(settings: Settings, engine: str) -> str | None:
    """What the engine that fails on purpose is told by, None for every other engine."""
    from serve_app.serve_config import FAULT_ENGINE, STUB_ENGINES

    if settings.prod and engine in STUB_ENGINES:
        fail(f"with PROD=1 there is no engine {engine}", EX_CONFIG)
    if engine != FAULT_ENGINE:
        return None
    if settings.fault_file is None:
        fail(f"the engine {FAULT_ENGINE} needs GATEWAY_FAULT_FILE", EX_CONFIG)
    return str(settings.fault_file.resolve())
