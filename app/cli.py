"""The command `sluice`. Every command imports what it needs when it runs, so that `sluice token` needs no torch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from app import development
from app.settings import ConfigError, Settings, load_settings

if TYPE_CHECKING:
    from app.client import GatewayClient
    from app.local_ray import LocalRay
    from serve_app.registry import Registry
    from serve_app.search import Searched
    from serve_app.serve_config import ServedModel
    from serve_app.train import FitConfig, TrainConfig

cli = typer.Typer(name="sluice", no_args_is_help=True, add_completion=False, help="A model server for trading.")
registry_cli = typer.Typer(no_args_is_help=True, help="Model versions: list, verify, alias.")
rollout_cli = typer.Typer(no_args_is_help=True, help="The share of callers that Ray Serve answers.")
cli.add_typer(registry_cli, name="registry")
cli.add_typer(rollout_cli, name="rollout")

T = TypeVar("T")

EX_CONFIG = 78  # sysexits.h: something is wrong with the configuration
_DEFAULT_URL = "http://127.0.0.1:8000"

out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False)

Url = Annotated[str | None, typer.Option("--url", help="Root of the gateway; default: the one `make run` started.")]
Token = Annotated[str | None, typer.Option("--token", help="Bearer token; default: one made from the secret here.")]
SignWith = Annotated[Path | None, typer.Option(help="Private key file to sign the version with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Entry point: an error that an operator can mend is one plain line, never a traceback."""
    try:
        cli()
    except ConfigError as error:
        fail(str(error), EX_CONFIG)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one plain line and end."""
    err.print(f"sluice: {message}", markup=False)
    sys.exit(code)


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Start a Ray on this machine and deploy there.")] = False,
) -> None:
    """Run the gateway in the foreground."""
    overrides: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = load_settings()
    if local and settings.jwt_secret is None and settings.jwt_secret_file is None:
        overrides["jwt_secret_file"] = development.development_secret()
    settings = settings.with_overrides(**overrides)
    settings.signing_secret()
    settings = settings.with_overrides(port=_require_free_port(settings.host, settings.port))
    _require_model(settings)
    _require_state(settings)
    # Uvicorn drains on SIGTERM and then raises it once more; the end was asked for, so it is no fault.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if local:
        _serve_local(settings)
    else:
        _run_gateway(settings)


def _serve_local(settings: Settings) -> None:
    """Ray as a child, the deployment put onto it while the gateway already serves; all of it ends together."""
    from app.local_ray import LocalRay, LocalRayFailed
    from serve_app.serve_config import ServedApplication, build_config

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    err.print("Starting Ray on this machine …")
    ray = LocalRay(num_cpus=max(2, os.cpu_count() or 1))
    try:
        with ray, development.announced(url, ray), development.LOG_FILE.open("ab") as log:
            os.environ.update(ray.environment)  # the bridge process inherits what it needs to join
            err.print(f"Starting the gateway on {url}; its log is {development.LOG_FILE}")
            application = ServedApplication(serves=_served(settings, settings.model_version, settings.engine))
            config = build_config(application)
            development.BackgroundDeploy(
                ray, config, gateway_url=url, say=err.print, on_ready=lambda: _invite(settings, url)
            ).start()
            _run_gateway(settings.with_overrides(ray_address=ray.address), log)
    except LocalRayFailed as error:
        fail(str(error))


def _run_gateway(settings: Settings, log_stream: IO[bytes] | None = None) -> None:
    import uvicorn

    from app.main import create_app

    uvicorn.run(
        create_app(settings, log_stream=log_stream),
        host=settings.host,
        port=settings.port,
        http="httptools",  # the strictest of uvicorn's two parsers about message framing
        loop="uvloop",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,  # a desk that asks every ten seconds keeps its connection
        timeout_graceful_shutdown=25,
    )


def _invite(settings: Settings, url: str) -> None:
    """Print a token and a line to paste, from any folder."""
    token = _mint(settings, "developer", "predict ops")
    body = development.example_request()
    out.print(
        f"\nSluice answers on {url}, from Ray Serve with legacy behind it. Ctrl-C ends all of it.", highlight=False
    )
    out.print(f"Token (scopes predict ops, 24 hours):\n\n{token}\n", soft_wrap=True, highlight=False)
    out.print("The newest MSFT window of the shipped bars, as raw float32:\n")
    out.print(
        f"curl -sS {url}/ray-serve/predict -H 'Authorization: Bearer {token}' "
        f"-H 'Content-Type: application/octet-stream' --data-binary '@{body}'\n",
        soft_wrap=True,
        highlight=False,
    )


def _require_free_port(host: str, port: int) -> int:
    """The port to listen on: the one asked for, or a free one for 0, so that it can be told before it listens."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fail(f"cannot listen on {host}:{port}: {error.strerror}; another port: make run PORT={port + 1}", EX_CONFIG)
        return int(probe.getsockname()[1])


def _require_model(settings: Settings) -> None:
    from serve_app.registry import RegistryError
    from serve_app.signing import KeyRefused

    if settings.legacy != "in_process" or settings.engine == "noop":
        return
    try:
        _registry(settings).load(settings.model, settings.model_version)
    except KeyRefused as error:
        fail(str(error), EX_CONFIG)
    except RegistryError as error:
        fail(f"no model to serve: {error}; `sluice registry list` shows what is in {settings.registry_path}", EX_CONFIG)


def _require_state(settings: Settings) -> None:
    from app.rollout.state import FileStore, Rollout, StateUnreadable

    try:
        asyncio.run(Rollout(FileStore(settings.state_dir), initial_fraction=settings.ray_serve_fraction).load())
    except StateUnreadable as error:
        fail(str(error), EX_CONFIG)
    except OSError as error:
        fail(f"cannot keep state in {settings.state_dir}: {error.strerror}", EX_CONFIG)


@cli.command()
def token(
    sub: Annotated[str, typer.Option(help="Who the token is for.")],
    scope: Annotated[str, typer.Option(help="Scopes, separated by spaces: predict ops admin features.")] = "predict",
    ttl: Annotated[int, typer.Option(help="Seconds it is good for, at most 86400.", min=1, max=86400)] = 86400,
) -> None:
    """Print one token and nothing else."""
    print(_mint(_client_settings(), sub, scope, ttl))


@cli.command()
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
    settings = _client_settings()
    with _client(settings, url, token, "predict") as gateway:
        report = _told(lambda: ask(gateway, symbol, until, settings.registry_path))
    if as_json:
        print(json.dumps(report))
    else:
        out.print(render(report))


@cli.command()
def train(
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="Networks per fold.", min=1)] = 3,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows at most.", min=1)] = None,
    publish: Annotated[bool, typer.Option(help="Publish the final refit as the next version.")] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for the version's or the search's files.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings of the fit, as `--search` writes them.")] = None,
    search: Annotated[int | None, typer.Option(help="Try so many settings on Ray instead.", min=2, max=1000)] = None,
    sign_with: SignWith = None,
) -> None:
    """Train walk-forward on the shipped bars, judge beside the baselines, refit, publish with a model card."""
    _require_extra("train", "training", "sklearn", "matplotlib")
    from serve_app.train import TrainConfig

    settings = TrainConfig(seed=seed, n_seeds=seeds, fit=_fit_settings(config, epochs))
    if search is None:
        _train(settings, _publishing_registry(_client_settings(), sign_with) if publish else None, output)
    else:
        _search(settings, search, output or development.RUN_DIR / "search")


def _require_extra(extra: str, purpose: str, *modules: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        fail(f"{purpose} needs {' and '.join(missing)}: pip install 'sluice[{extra}]'", EX_CONFIG)


def _fit_settings(file: Path | None, epochs: int | None) -> FitConfig:
    from serve_app.train import FitConfig

    try:
        fit = FitConfig() if file is None else FitConfig.from_dict(json.loads(file.read_text()))
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror}", EX_CONFIG)
    except (ValueError, TypeError, AttributeError) as error:
        fail(f"{file} is no file of settings: {error}", EX_CONFIG)
    return fit if epochs is None else replace(fit, max_epochs=epochs)


def _search(settings: TrainConfig, n_trials: int, folder: Path) -> None:
    """Search on a Ray of our own, which ends with the search, however that ends."""
    _require_extra("tune", "a search", "pandas", "pyarrow", "tensorboardX")
    from rich.markdown import Markdown

    from app.local_ray import LocalRay, LocalRayFailed

    err.print("Starting Ray on this machine …")
    try:
        with LocalRay(num_cpus=os.cpu_count() or 1) as ray:
            searched = _search_on(ray, settings, n_trials)
    except LocalRayFailed as error:
        fail(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in searched.files.items():
        (folder / name).write_bytes(data)
    out.print(Markdown(searched.files["SEARCH.md"].decode()))
    out.print(f"Wrote {', '.join(searched.files)} to {folder}", highlight=False)


def _search_on(ray: LocalRay, settings: TrainConfig, n_trials: int) -> Searched:
    """Search with a live table of the trials."""
    os.environ.update(ray.environment)  # before Ray is imported: it reads some of it only then
    from rich.live import Live

    from app.search_table import render
    from serve_app.search import SearchConfig, SearchFailed, search

    with Live(console=err, refresh_per_second=2) as live:
        try:
            return search(
                SearchConfig(settings, n_trials),
                ray_address=ray.address,
                scratch=ray.directory / "tune",
                on_change=lambda trials: live.update(render(trials, n_trials)),
            )
        except SearchFailed as error:
            fail(str(error))


def _train(config: TrainConfig, registry: Registry | None, output: Path | None) -> None:
    from rich.markdown import Markdown
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from serve_app.train import train as run

    columns = (TextColumn("{task.description:<32}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=err) as bars:
        bar = bars.add_task("reading bars", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bars.update(bar, description=stage, completed=done, total=total)

        trained = _told(lambda: run(config, registry=registry, output=output, progress=show))
        bars.update(bar, description="done", completed=1, total=1)
    out.print(Markdown(trained.files["CARD.md"].decode()))
    if trained.version is not None:
        out.print(f"Published cnn_lstm {trained.version}", highlight=False)


@cli.command()
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
        _require_extra("train", "a picture", "matplotlib")
        if not picture.parent.is_dir():
            fail(f"there is no folder {picture.parent} for the picture", EX_CONFIG)
    from app.bench.inputs import draw_windows
    from app.bench.load import NoTarget, Plan
    from app.bench.report import render
    from app.bench.run import run
    from app.bench.targets import HandleTarget, HttpTarget

    callers = concurrency or (10 if rate is None else 64)
    plan = Plan(requests if requests or duration else 1000, duration, callers, rate, timeout)
    settings = _client_settings()
    inputs = draw_windows(64, windows, seed)
    try:
        asked: HttpTarget | HandleTarget
        if target == "http":
            bearer = _token_for(settings, token, "bench", "predict", 86400)
            asked = HttpTarget(_gateway_url(url), bearer, inputs, body=body, timeout_s=timeout)
        else:
            address, environment = _ray_to_join(settings)
            asked = HandleTarget(address, inputs, environment=environment, concurrency=callers, timeout_s=timeout)
        report, samples = run(asked, plan, body=body, windows_per_request=windows, seed=seed, console=err)
    except NoTarget as error:
        fail(str(error))
    if picture is not None:
        from app.bench.picture import latency_picture

        picture.write_bytes(latency_picture(report, samples))
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        out.print(render(report, samples))
    sys.exit(0 if report.meets_requirements else 1)


def _ray_to_join(settings: Settings) -> tuple[str, dict[str, str]]:
    """Address of the Ray cluster, and what a driver needs to join it: the settings', or `sluice serve --local`'s."""
    if settings.ray_address is not None:
        return settings.ray_address, {}
    try:
        environment = json.loads(development.RAY_FILE.read_text())
    except OSError:
        fail("no Ray to join: set RAY_ADDRESS, or run `sluice serve --local` in this folder", EX_CONFIG)
    return environment["RAY_ADDRESS"], environment


@registry_cli.command("list")
def registry_list(as_json: AsJson = False) -> None:
    """Show every model, version and alias."""
    registry = _told(lambda: _registry(_client_settings()))
    rows = _told(
        lambda: [
            {
                "model": model,
                "version": version,
                "aliases": sorted(alias for alias, to in registry.aliases(model).items() if to == version),
                "published": registry.verify(model, version).created_at.isoformat(timespec="seconds"),
            }
            for model in registry.models()
            for version in registry.versions(model)
        ]
    )
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("model", "version", "aliases", "published")
    for row in rows:
        table.add_row(str(row["model"]), str(row["version"]), ", ".join(row["aliases"]), str(row["published"]))
    out.print(table)


@registry_cli.command("verify")
def registry_verify(model: str = "cnn_lstm", version: str = "latest") -> None:
    """Check every byte of a version against its manifest, and that against its signature where a key is set."""
    settings = _client_settings()
    manifest = _told(lambda: _registry(settings).verify(model, version))
    signed = "; the signature is good" if settings.registry_key_file else ""
    out.print(f"{model} {manifest.version}: {len(manifest.files)} files as they were published{signed}")


@registry_cli.command("publish")
def registry_publish(
    folder: Annotated[Path, typer.Argument(help="Holds model.pth or model.safetensors, and config.json.")],
    name: Annotated[str, typer.Option(help="Model to publish it under.")] = "cnn_lstm",
    version: Annotated[str | None, typer.Option(help="Version; default: the next number.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias that shall stand for it from now on.")] = None,
    sign_with: SignWith = None,
) -> None:
    """Check a model folder, convert it to safetensors and publish it as a new version."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from serve_app.artefacts import import_folder

    registry = _publishing_registry(_client_settings(), sign_with)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as bars:
        bar = bars.add_task("reading", total=None)
        imported = _told(lambda: import_folder(folder, lambda stage: bars.update(bar, description=stage)))
        bars.update(bar, description="sealing")
        published = _told(lambda: registry.publish(name, version=version, files=imported.files, **imported.facts))
        bars.update(bar, description="done", total=1, completed=1)
    if imported.left_out:
        err.print(f"Left out: {', '.join(imported.left_out)}", markup=False)
    out.print(f"Published {name} {published}", highlight=False)
    if alias is not None:
        _told(lambda: registry.set_alias(name, alias, published))
        out.print(f"{name}: {alias} is now version {published}", highlight=False)


@registry_cli.command("keygen")
def registry_keygen(
    folder: Annotated[Path, typer.Argument(help="Existing folder for registry.key and registry.pub.")],
) -> None:
    """Make a pair of keys: registry.key signs and stays with whoever publishes, registry.pub verifies."""
    from serve_app.signing import generate

    private, public = folder / "registry.key", folder / "registry.pub"
    _told(lambda: generate(private, public))
    out.print(
        f"{private}: private, 0600; for --sign-with. Keep it off the machines that serve.",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"{public}: public; GATEWAY_REGISTRY_KEY_FILE={public} serves signed versions only.",
        highlight=False,
        soft_wrap=True,
    )


@registry_cli.command("sign")
def registry_sign(
    version: Annotated[str, typer.Argument(help="Version, no alias.")],
    sign_with: Annotated[Path, typer.Option(help="Private key file.")],
    model: str = "cnn_lstm",
) -> None:
    """Sign a published version after checking every byte of it: you vouch for it from now on."""
    _told(lambda: _registry(_client_settings(), sign_with).sign(model, version))
    out.print(f"{model} {version} is signed", highlight=False)


@registry_cli.command("alias")
def registry_alias(alias: str, version: str, model: str = "cnn_lstm") -> None:
    """Let an alias stand for a version."""
    _told(lambda: _registry(_client_settings()).set_alias(model, alias, version))
    out.print(f"{model}: {alias} is now version {version}")


@rollout_cli.command("show")
def rollout_show(url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show the share in force."""
    with _client(_client_settings(), url, token, "ops") as gateway:
        _print_rollout(_told(gateway.rollout), as_json)


@rollout_cli.command("set")
def rollout_set(
    fraction: Annotated[float, typer.Argument(help="Share of callers whom Ray Serve answers.", min=0, max=1)],
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Change the share; 0 sends everybody back to legacy."""
    with _client(_client_settings(), url, token, "ops admin") as gateway:
        _print_rollout(_told(lambda: gateway.set_fraction(fraction)), as_json)


def _print_rollout(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document))
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(document["changed_at"]))
    out.print(f"ray_serve {document['ray_serve_fraction']:.2%}, set by {document['changed_by']} on {when}")


@cli.command()
def deploy(
    profile: Annotated[str, typer.Option(help="Autoscaling profile.")] = "local",
    size: Annotated[str, typer.Option(help="Size of a replica: small, medium, large or local.")] = "local",
    version: Annotated[str, typer.Option(help="Version or alias.")] = "latest",
    engine: Annotated[str, typer.Option(help="Engine of the replicas.")] = "torch",
    device: Annotated[str, typer.Option(help="Device of the replicas: cpu, cuda or cuda:N.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the Serve configuration, deploy nothing.")] = False,
    wait_s: Annotated[float, typer.Option(help="How long to wait until it runs.")] = 300.0,
) -> None:
    """Put the deployment onto the Ray cluster; other applications there stay as they are."""
    from pydantic import ValidationError

    from app.serve_api import DeployFailed, ServeApi
    from serve_app.serve_config import ServedApplication, build_config

    settings = _client_settings()
    try:
        application = ServedApplication.model_validate(
            {"profile": profile, "size": size, "serves": _served(settings, version, engine, device)}
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


@cli.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what Sluice needs and say what to do; ends with 1 when something fails."""
    from app.doctor import examine, examine_installation, render, settings_refused

    findings = examine_installation()
    try:
        findings += examine(_client_settings())
    except ConfigError as error:
        findings.append(settings_refused(error))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        out.print(render(findings))
    if any(finding.level == "fail" for finding in findings):
        sys.exit(1)


def _served(settings: Settings, version: str, engine: str, device: str = "cpu") -> ServedModel:
    """What the replicas shall serve, with an alias pinned to the version that it stands for now.

    A replica resolves an alias when it loads it, so two of them could serve two versions under one name.
    """
    from serve_app.serve_config import ServedModel

    version = _told(lambda: _registry(settings).resolve(settings.model, version))
    return ServedModel.model_validate(
        {
            "registry_path": str(settings.registry_path.resolve()),
            "model": settings.model,
            "version": version,
            "engine": engine,
            "device": device,
            "registry_key_path": settings.registry_key_file and str(settings.registry_key_file),
        }
    )


def _registry(settings: Settings, signing_key_file: Path | None = None) -> Registry:
    from serve_app.registry import open_registry

    return open_registry(settings.registry_path, key_file=settings.registry_key_file, signing_key_file=signing_key_file)


def _publishing_registry(settings: Settings, signing_key_file: Path | None) -> Registry:
    """A registry to publish into; it is told before the work, not after, that a version would be refused unsigned."""
    if settings.registry_key_file is not None and signing_key_file is None:
        fail("GATEWAY_REGISTRY_KEY_FILE is set, so versions must be signed: give --sign-with", EX_CONFIG)
    return _told(lambda: _registry(settings, signing_key_file))


def _client_settings() -> Settings:
    """The settings, with the development secret where no other is set and `make run` made one here."""
    settings = load_settings()
    if settings.jwt_secret is None and settings.jwt_secret_file is None and development.SECRET_FILE.exists():
        return settings.with_overrides(jwt_secret_file=development.SECRET_FILE)
    return settings


def _client(settings: Settings, url: str | None, token: str | None, scope: str) -> GatewayClient:
    from app.client import GatewayClient

    return GatewayClient(_gateway_url(url), _token_for(settings, token, "operator", scope))


def _gateway_url(url: str | None) -> str:
    """The address given, that of the gateway which `make run` started here, or the default."""
    if url is not None:
        return url
    return development.URL_FILE.read_text() if development.URL_FILE.exists() else _DEFAULT_URL


def _token_for(settings: Settings, token: str | None, subject: str, scope: str, lifetime_s: int = 60) -> str:
    token = token or _mint(settings, subject, scope, lifetime_s)
    if not token.isascii():
        fail("the token holds a character that no token has")
    return token


def _mint(settings: Settings, subject: str, scope: str, lifetime_s: int = 86400) -> str:
    from app.auth import mint_token

    try:
        return mint_token(
            settings.signing_secret(),
            subject=subject,
            scopes=scope.split(),
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            lifetime_s=lifetime_s,
            now=time.time(),
        )
    except ValueError as error:
        fail(str(error))


def _told(ask: Callable[[], T]) -> T:
    """The answer, or one plain line for what is known to go wrong."""
    from app.client import GatewayRefused
    from app.symbol_report import NoWindow
    from serve_app.registry import RegistryError
    from serve_app.signing import KeyRefused

    try:
        return ask()
    except (GatewayRefused, RegistryError, KeyRefused, NoWindow) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
