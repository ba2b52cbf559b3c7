"""`sluice serve`: the gateway in the foreground, with a Ray of its own where that is asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from app import development
from app.cli.access import lacks_identity, mint
from app.cli.deploy import served_model
from app.cli.registry import registry_of
from app.cli.terminal import EX_CONFIG, err, fail, out
from app.environment import load_settings
from app.settings import Settings, variable_of


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Start a Ray on this machine and deploy there.")] = False,
) -> None:
    """Run the gateway in the foreground."""
    overrides: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = load_settings()
    if local and lacks_identity(settings):
        overrides["jwt_secret_file"] = development.development_secret()
    settings = settings.with_overrides(**overrides)
    from app.identity import require_identity

    require_identity(settings)
    listener = _listener(settings.host, settings.port)
    settings = settings.with_overrides(port=listener.getsockname()[1])
    _require_model(settings)
    _require_state(settings)
    _require_kills(settings)
    _require_parts(settings, joins_own_ray=local)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the supervisor takes it over
    if local:
        _serve_local(settings, listener)
    else:
        _run_gateway(settings, listener)


def _serve_local(settings: Settings, listener: socket.socket) -> None:
    """Ray as a child, the deployment put onto it while the gateway already serves; all of it ends together."""
    from app.local_ray import LocalRay, LocalRayFailed
    from serve_app.serve_config import ServedApplication, build_config

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    err.print("Starting Ray on this machine …")
    ray = LocalRay(num_cpus=max(2, os.cpu_count() or 1))
    try:
        with ray, development.announced(url, ray):
            os.environ.update(ray.environment)  # the bridge process inherits what it needs to join
            err.print(f"Starting the gateway on {url}; its log is {development.LOG_FILE}")
            application = ServedApplication(
                serves=served_model(settings, settings.model_version, settings.engine, exact=settings.exact)
            )
            config = build_config(application)
            development.BackgroundDeploy(
                ray, config, gateway_url=url, say=err.print, on_ready=lambda: _invite(settings, url)
            ).start()
            # Nobody else takes over what a developer ends, so nobody needs notice.
            settings = settings.with_overrides(ray_address=ray.address, drain_notice_ms=0)
            _run_gateway(settings, listener, development.LOG_FILE)
    except LocalRayFailed as error:
        fail(str(error))


def _run_gateway(settings: Settings, listener: socket.socket, log_file: Path | None = None) -> None:
    from app import workers

    with _metrics_shared(settings) as shared:
        sys.exit(workers.serve(shared, listener, log_file))


@contextmanager
def _metrics_shared(settings: Settings) -> Iterator[Settings]:
    """Give several workers a folder in which their metrics add up, empty at the start; one worker needs none."""
    if settings.workers == 1 or settings.multiproc_dir is not None:
        for stale in () if settings.multiproc_dir is None else settings.multiproc_dir.glob("*.db"):
            stale.unlink()
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="sluice-metrics-") as folder:
        os.environ[variable_of("multiproc_dir")] = folder  # the library looks for it itself, in each worker
        yield settings.with_overrides(multiproc_dir=folder)


def _invite(settings: Settings, url: str) -> None:
    """Print a token and a line to paste, from any folder."""
    out.print(
        f"\nSluice answers on {url}, from Ray Serve with legacy behind it. Ctrl-C ends all of it.", highlight=False
    )
    if settings.judges_by_public_keys:
        out.print("Tokens come from the issuer of your keys.")
        return
    token = mint(settings, "developer", "predict ops")
    body = development.example_request()
    out.print(f"Token (scopes predict ops, 24 hours):\n\n{token}\n", soft_wrap=True, highlight=False)
    out.print("The newest MSFT window of the shipped bars, as raw float32:\n")
    out.print(
        f"curl -sS {url}/ray-serve/predict -H 'Authorization: Bearer {token}' "
        f"-H 'Content-Type: application/octet-stream' --data-binary '@{body}'\n",
        soft_wrap=True,
        highlight=False,
    )


def _listener(host: str, port: int) -> socket.socket:
    """The socket to serve on, bound before anything else is started, so that its address can be told."""
    from app import workers

    try:
        return workers.listen(host, port)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror}; another port: make run PORT={port + 1}", EX_CONFIG)


def _require_model(settings: Settings) -> None:
    from serve_app.extras import why_missing
    from serve_app.registry import RegistryError
    from serve_app.serve_config import STUB_ENGINES
    from serve_app.signing import KeyRefused

    if settings.legacy != "in_process" or settings.engine in STUB_ENGINES:
        return
    if reason := why_missing(settings.engine):
        fail(f"GATEWAY_ENGINE={settings.engine}: {reason}", EX_CONFIG)
    try:
        registry_of(settings).load(settings.model, settings.model_version)
    except KeyRefused as error:
        fail(str(error), EX_CONFIG)
    except RegistryError as error:
        fail(f"no model to serve: {error}; `sluice registry list` shows what is in {settings.registry_path}", EX_CONFIG)


def _require_state(settings: Settings) -> None:
    from app.rollout.rollout import DOCUMENT, check_document
    from app.rollout.state import FileStore, StateUnreadable

    try:
        asyncio.run(FileStore(settings.state_dir, check_document).read(DOCUMENT))
    except StateUnreadable as error:
        if settings.redis_url is None:  # else it is but a copy
            fail(str(error), EX_CONFIG)
    except OSError as error:
        fail(f"cannot keep state in {settings.state_dir}: {error.strerror}", EX_CONFIG)


def _require_kills(settings: Settings) -> None:
    """A worker that cannot tell what is killed refuses everything: nobody is to begin with that."""
    from app.rollout.kill_places import FILE_NAME, KillFile, KillsUnreadable

    try:
        KillFile(settings.state_dir / FILE_NAME).look()
    except KillsUnreadable as error:
        fail(str(error), EX_CONFIG)


def _require_parts(settings: Settings, *, joins_own_ray: bool) -> None:
    """What a worker builds from the settings alone; each would find the same fault, and be replaced for ever."""
    from app.wiring import require_parts

    # Its own Ray has no address before it runs, but it is one that answers.
    require_parts(settings.with_overrides(ray_address="auto") if joins_own_ray else settings)
