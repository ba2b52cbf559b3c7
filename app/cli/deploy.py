"""`sluice deploy`: the deployment onto a Ray cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.access import client_settings, gateway_client
from app.cli.options import Device, Engine, Profile, Size, WaitS
from app.cli.registry import registry_of
from app.cli.terminal import EX_CONFIG, err, fail
from app.settings import Settings

if TYPE_CHECKING:
    from app.backends.base import Arm
    from app.client import GatewayClient
    from serve_app.serve_config import ServedApplication, ServedModel


def deploy(
    profile: Profile = "local",
    size: Size = "local",
    version: Annotated[str, typer.Option(help="Version or alias.")] = "latest",
    engine: Engine = "torch",
    device: Device = "cpu",
    exact: Annotated[bool, typer.Option("--exact", help="Answer bits that do not depend on batch mates.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the Serve configuration, deploy nothing.")] = False,
    wait_s: WaitS = 300.0,
) -> None:
    """Put the deployment onto the Ray cluster; other applications there stay as they are."""
    settings = client_settings()
    application = served_application(
        lambda: served_model(settings, version, engine, device, exact), profile=profile, size=size
    )
    if dry_run:
        from serve_app.serve_config import build_config

        print(json.dumps(build_config(application), indent=2))
        return
    put_application(settings, application, wait_s)
    _ask_for_rejections(settings, application.serves.version)


def served_application(serves: Callable[[], ServedModel], **options: str) -> ServedApplication:
    """The application with its `name`, `profile` and `size`; a fault of them is one line, and ends the command."""
    from pydantic import ValidationError

    from serve_app.serve_config import ServedApplication, build_config

    try:
        application = ServedApplication.model_validate({**options, "serves": serves()})
        build_config(application)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        fail(f"{fault['loc'][-1]}: {fault['msg']}", EX_CONFIG)
    except ValueError as error:
        fail(str(error), EX_CONFIG)
    return application


def put_application(settings: Settings, application: ServedApplication, wait_s: float) -> None:
    """Put it beside what is there, and wait until it runs."""
    from app.serve_api import DeployFailed, ServeApi
    from serve_app.serve_config import build_config

    _require_loadable(application.serves)
    try:
        with ServeApi(settings.ray_dashboard_url, token=settings.ray_auth_token()) as api:
            standby = _standby(api.application(application.name), application.serves)
            serves = application.serves.model_copy(update={"standby": standby})
            api.put(build_config(application.model_copy(update={"serves": serves})))
            api.wait_running(application.name, timeout_s=wait_s, on_progress=err.print, clock=time.monotonic)
    except DeployFailed as error:
        fail(str(error))


def application_of(arm: Arm) -> str:
    """The application that answers for an arm on Ray Serve."""
    from serve_app.contract import APP_NAME

    return f"{APP_NAME}-{arm.version}" if arm.version else APP_NAME


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


def _ask_for_rejections(settings: Settings, version: str) -> None:
    """Fail where the gateway that is here knows of replicas that refused the version."""
    if settings.jwt_secret is None and settings.jwt_secret_file is None:
        err.print("no JWT secret here: the gateway was not asked whether replicas refused the version")
        return
    with gateway_client(settings, None, None, "ops") as gateway:
        require_taken(gateway, version)


def require_taken(gateway: GatewayClient, version: str) -> None:
    """Fail where the gateway knows of replicas that refused the version: Serve does not tell."""
    from app.client import GatewayRefused

    try:
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

    version = known_version(settings, version)
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


def known_version(settings: Settings, version: str) -> str:
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
