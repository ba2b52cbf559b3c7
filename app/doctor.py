"""`sluice doctor`: looks at everything that Sluice needs and says what to do about what is wrong. Changes nothing."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import httpx
from rich.markup import escape
from rich.table import Table

from app.auth import ApiKeyFile, KeyFile, KeyUrl
from app.identity import build_token_source, load_file
from app.secret_files import check_secret, read_secret_file
from app.serve_api import DeployFailed, ServeApi
from app.settings import ConfigError, Settings
from app.shared.commands import Command, RedisAway
from serve_app.contract import APP_NAME
from serve_app.extras import why_missing
from serve_app.registry import RegistryError, open_registry
from serve_app.serve_config import STUB_ENGINES
from serve_app.signing import KeyRefused

Level = Literal["ok", "warn", "fail"]

_COLOURS: Mapping[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

PATIENCE_S = 3.0
RAY_PATIENCE_S = 30.0  # importing Ray on a busy machine
CLOCK_TOLERANCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was looked at.
        level: `fail` keeps Sluice from working as it is set, `warn` does not.
        found: What is the case.
        advice: What to do about it; empty when all is well.
    """

    check: str
    level: Level
    found: str
    advice: str = ""


def examine_installation(requirements: Iterable[str] | None = None) -> list[Finding]:
    """Check what needs no settings: Python and the installed packages.

    Args:
        requirements: As package metadata has them; those of Sluice unless given.
    """
    pins = dict(_pins((requires("sluice") or ()) if requirements is None else requirements))
    return [_python(sys.version_info[:2]), _packages(pins, {name: _installed(name) for name in pins})]


def examine(
    settings: Settings,
    *,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Check what the settings name: port, model, secrets, state, Ray and the clock.

    Args:
        settings: As the gateway would get them.
        clock: Seconds, monotonic.
        wall_clock: Seconds since the epoch.
    """
    began = wall_clock() - clock()
    return [
        _port(settings.host, settings.port),
        _registry(settings, wall_clock()),
        _issuer_keys(settings) if settings.judges_by_public_keys else _token_secret(settings),
        _api_keys(settings),
        _state_folder(settings.state_dir),
        _dotenv(Path(".env")),
        _legacy(settings),
        *_ray(settings),
        _redis(settings),
        _clock(wall_clock, stepped_s=wall_clock() - clock() - began),
    ]


def settings_refused(error: ConfigError) -> Finding:
    """The finding of settings that cannot be read; the checks that need them are left out."""
    return Finding("settings", "fail", str(error), "mend it in the environment or in .env; .env.example names them all")


def render(findings: list[Finding]) -> Table:
    """The findings as a table for people."""
    table = Table("check", "", "found", "what to do")
    for finding in findings:
        colour = _COLOURS[finding.level]
        table.add_row(finding.check, f"[{colour}]{finding.level}[/]", escape(finding.found), escape(finding.advice))
    return table


def _python(running: tuple[int, int]) -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= running < (3, 14):
        return Finding("python", "ok", found)
    return Finding("python", "fail", found, "install Python 3.11 to 3.13 and run: make clean run PYTHON=python3.11")


def _pins(requirements: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and version of the pinned requirements that belong to no extra."""
    for requirement in requirements:
        if pinned := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^; ]+)$", requirement):
            yield pinned[1], pinned[2]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(pins: Mapping[str, str], installed: Mapping[str, str | None]) -> Finding:
    def differs(name: str) -> bool:
        return (installed[name] or "").partition("+")[0] != pins[name]  # 2.13.0+cpu is a build of 2.13.0

    if wrong := [f"{name} {installed[name] or 'missing'}, not {pins[name]}" for name in pins if differs(name)]:
        mend = f"{sys.executable} -m pip install --constraint constraints.txt --editable ."
        return Finding("packages", "fail", "; ".join(wrong), mend)
    named = ", ".join(f"{name} {installed[name]}" for name in ("ray", "torch", "numpy", "fastapi") if name in pins)
    return Finding("packages", "ok", f"{named}: all {len(pins)} as pinned")


def _port(host: str, port: int) -> Finding:
    where = f"{host}:{port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if _is_sluice(host, port):
                return Finding("port", "ok", f"a Sluice answers on {where}")
            return Finding("port", "fail", f"cannot listen on {where}: {error.strerror}", "choose another GATEWAY_PORT")
    return Finding("port", "ok", f"{where} is free")


def _is_sluice(host: str, port: int) -> bool:
    reached_at = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  # compared, never listened on
    try:
        live = httpx.get(f"http://{reached_at}:{port}/health/live", timeout=PATIENCE_S, trust_env=False)
        return bool(live.json() == {"status": "live"})
    except (httpx.HTTPError, ValueError):
        return False


def _registry(settings: Settings, now: float) -> Finding:
    where = f"{settings.model} {settings.model_version} in {settings.registry_path}"
    try:
        registry = open_registry(settings.registry_path, key_file=settings.registry_key_file)
        manifest = registry.verify(settings.model, settings.model_version)
    except KeyRefused as error:
        return Finding("registry", "fail", str(error), "name a public ed25519 key in GATEWAY_REGISTRY_KEY_FILE")
    except RegistryError as error:
        advice = "set MODEL_REGISTRY_PATH to a registry that has it; `sluice registry list` shows what is there"
        return Finding("registry", "fail", f"{where}: {error}", advice)
    if manifest.created_at.timestamp() > now:
        return Finding("registry", "warn", f"{where} was published in the future", "set this machine's clock")
    sealed = "published and signed" if settings.registry_key_file else "published"
    return Finding("registry", "ok", f"{where}: version {manifest.version}, {len(manifest.files)} files as {sealed}")


def _token_secret(settings: Settings) -> Finding:
    """Strength and file mode of the secret were checked when the settings were read, and are again here."""
    try:
        secret = settings.signing_secret()
        if settings.jwt_secret_file is not None:
            check_secret(read_secret_file(settings.jwt_secret_file), "the token secret")
    except (ConfigError, ValueError) as error:
        return Finding("token secret", "fail", str(error), "openssl rand -base64 48 makes one")
    if settings.jwt_secret_file is not None:
        return Finding("token secret", "ok", f"{len(secret)} bytes in {settings.jwt_secret_file}, closed to others")
    return Finding(
        "token secret",
        "warn",
        f"{len(secret)} bytes from the environment, where other processes of this user can read it",
        "put it into a file of mode 0600 and name that in GATEWAY_JWT_SECRET_FILE",
    )


def _issuer_keys(settings: Settings) -> Finding:
    """What the gateway would judge tokens by: the file's keys, or what the URL gives now."""
    try:
        source = build_token_source(settings, lambda _: None, lambda *_: None, time.monotonic)
        if isinstance(source, KeyFile):
            load_file(source)
    except ConfigError as error:
        return Finding("token keys", "fail", str(error), "give it a set of public keys, or unset GATEWAY_JWT_JWKS_FILE")
    if isinstance(source, KeyUrl):
        asyncio.run(source.fetch())
    count = 0 if source is None else source.document()["keys"]
    where = settings.jwt_jwks_file or settings.jwt_jwks_url
    if not count:
        advice = "until it does, tokens get 503; see whether the URL is right and its keys are for RS256 or ES256"
        return Finding("token keys", "fail", f"{where} gives no keys", advice)
    return Finding("token keys", "ok", f"{count} from {where}")


def _api_keys(settings: Settings) -> Finding:
    table, pepper = settings.api_key_paths()
    try:
        count = len(ApiKeyFile(table, pepper).read().keys)
    except OSError as error:
        return Finding("API keys", "fail", f"cannot read {error.filename}: {error.strerror}", "put it back")
    except ValueError as error:
        return Finding("API keys", "fail", f"{table}: {error}", "put a good copy of table and pepper back")
    return Finding("API keys", "ok", f"{count} in {table}" if count else "none")


def _state_folder(folder: Path) -> Finding:
    if not folder.exists():
        return Finding("state folder", "ok", f"{folder} is not there yet; the gateway makes it")
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Finding("state folder", "fail", f"{folder} cannot be written", f"give it to the user {os.getuid()}")
    if mode & 0o022:
        advice = f"chmod 700 {folder}"
        return Finding("state folder", "fail", f"others can write to {folder} (mode {mode:04o})", advice)
    if opened := [path for path in folder.glob("*.key") if stat.S_IMODE(path.stat().st_mode) & 0o077]:
        return Finding("state folder", "fail", f"others can open {opened[0]}", f"chmod 600 {opened[0]}")
    return Finding("state folder", "ok", f"{folder} can be written by us alone (mode {mode:04o})")


def _dotenv(file: Path) -> Finding:
    if not file.is_file():
        return Finding(".env", "ok", "none here")
    holds_secrets = re.search(r"^\s*(export\s+)?\w*(SECRET|KEY|PASSWORD)=\S", file.read_text(), re.MULTILINE)
    if holds_secrets and stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Finding(".env", "warn", "holds a secret and can be opened by others", "chmod 600 .env")
    return Finding(".env", "ok", "read")


def _legacy(settings: Settings) -> Finding:
    if settings.legacy == "off":
        return Finding("legacy", "ok", "off: nothing stands behind Ray Serve")
    if settings.legacy == "in_process":
        if settings.engine in STUB_ENGINES:
            return Finding(
                "legacy", "warn", f"the engine {settings.engine} answers a constant", "set GATEWAY_ENGINE=torch"
            )
        if reason := why_missing(settings.engine):
            return Finding("legacy", "fail", reason, "install it, or set GATEWAY_ENGINE=torch")
        return Finding("legacy", "ok", "in this process")
    url = httpx.URL(settings.legacy_url or "")
    try:
        _connect(url.host, url.port or (443 if url.scheme == "https" else 80))
    except OSError as error:
        advice = "start the old service, or correct GATEWAY_LEGACY_URL"
        return Finding("legacy", "fail", f"nobody answers at {url}: {error}", advice)
    return Finding("legacy", "ok", f"somebody listens at {url}")


def _connect(host: str, port: int) -> None:
    """Open a connection and close it. Raises `OSError`."""
    socket.create_connection((host.strip("[]"), port), PATIENCE_S).close()


def _ray(settings: Settings) -> list[Finding]:
    if settings.ray_address is None:
        if settings.legacy == "off":
            return [Finding("ray", "fail", "nothing can answer", "set RAY_ADDRESS, or GATEWAY_LEGACY=in_process")]
        return [Finding("ray", "ok", "not configured: legacy answers alone")]
    try:
        token = settings.ray_auth_token()
    except ConfigError as error:
        return [Finding("ray", "fail", str(error), "name the cluster's token file in RAY_AUTH_TOKEN_PATH")]
    return [
        _ray_control_store(settings.ray_address),
        _ray_dashboard(settings.ray_dashboard_url, token),
        _ray_guard(settings.ray_dashboard_url),
    ]


def _ray_control_store(address: str) -> Finding:
    """Ask as the bridge process will: a child with our environment, in which Ray looks for its token itself."""
    if address == "auto":
        return Finding("ray", "warn", "RAY_ADDRESS=auto takes whichever cluster runs here", "give host:6379")
    host, _, port = address.rpartition(":")
    try:
        _connect(host, int(port))
    except OSError as error:
        advice = "start the cluster, or correct RAY_ADDRESS; until then legacy answers"
        return Finding("ray", "fail", f"nobody answers at {address}: {error}", advice)
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(  # noqa: S603  # our own interpreter, an address that the settings have checked
            command, capture_output=True, text=True, timeout=RAY_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("ray", "fail", f"{address} is no Ray, or a hung one", "look at the head's logs")
    if asked.returncode == 0:
        return Finding("ray", "ok", f"the cluster at {address} takes our calls")
    if "AuthenticationError" in asked.stderr + asked.stdout:
        advice = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH with the cluster's token file"
        return Finding("ray", "fail", f"the cluster at {address} refuses our token", advice)
    return Finding("ray", "fail", f"the cluster at {address} is not well", "look at the head's logs")


def _ray_dashboard(url: str, token: str | None) -> Finding:
    try:
        with ServeApi(url, token=token, timeout_s=PATIENCE_S) as api:
            application = api.application(APP_NAME)
    except DeployFailed as error:
        return Finding("deployment", "fail", str(error), "correct GATEWAY_RAY_DASHBOARD_URL or RAY_AUTH_TOKEN_PATH")
    status = application.get("status", "not deployed")
    if refusal := _refused_by_replicas(application):
        advice = "sluice deploy with a version that verifies; `sluice registry list` shows what is there"
        return Finding("deployment", "fail", f"{refusal}: replicas serve what they had, new ones cannot start", advice)
    if status == "RUNNING":
        return Finding("deployment", "ok", f"{APP_NAME} is running")
    return Finding("deployment", "warn", f"{APP_NAME}: {status.lower()}", "sluice deploy")


def _refused_by_replicas(application: dict[str, Any]) -> str | None:
    """Why no replica would load what Serve was told to serve, as far as the registry can be read here."""
    for deployment in application.get("deployments", {}).values():
        serves = (deployment.get("deployment_config") or {}).get("user_config") or {}
        if serves.get("engine") in STUB_ENGINES or not Path(serves.get("registry_path", "")).is_dir():
            continue
        key_path = serves.get("registry_key_path")
        try:
            registry = open_registry(Path(serves["registry_path"]), key_file=key_path and Path(key_path))
            registry.verify(serves["model"], serves["version"])
        except (RegistryError, KeyRefused) as error:
            return f"{serves['model']} {serves['version']}: {error}"
    return None


def _ray_guard(url: str) -> Finding:
    """Whether the cluster refuses those who show no token."""
    try:
        answer = httpx.get(f"{url}/api/serve/applications/", timeout=PATIENCE_S, trust_env=False)
    except httpx.HTTPError:
        return Finding("ray token", "warn", f"could not be tried: no dashboard at {url}", "see `deployment`")
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return Finding("ray token", "ok", "the cluster refuses strangers")
    advice = "start every node of it with RAY_AUTH_MODE=token and a token file"
    return Finding("ray token", "warn", "whoever reaches the cluster can run code on it", advice)


def _redis(settings: Settings) -> Finding:
    """Whether Redis takes writes from us, by the connection that the gateway will use."""
    address = settings.redis_address()
    if address is None:
        return Finding("redis", "ok", "not configured: one gateway keeps its state in files")
    where = address.path or f"{address.host}:{address.port}"
    try:
        asyncio.run(_write_to_redis(settings))
    except RedisAway as away:
        advice = "start it, or correct REDIS_URL and GATEWAY_REDIS_PASSWORD_FILE; until then each worker counts alone"
        return Finding("redis", "fail", f"{where} takes no writes from us: {away}", advice)
    if address.password is not None:
        advice = "put it into a file of mode 0600 and name that in GATEWAY_REDIS_PASSWORD_FILE"
        return Finding("redis", "warn", f"{where} takes our writes; its password is in the environment", advice)
    return Finding("redis", "ok", f"{where} takes our writes")


async def _write_to_redis(settings: Settings) -> None:
    """Raises `RedisAway`."""
    from app.wiring import redis_link  # noqa: PLC0415  # all of the gateway, which no other check needs

    link = redis_link(settings)
    assert link is not None, "there is an address"
    try:
        [answer] = await link.ask([Command(None, ("SET", "sluice:doctor", "1", "PX", "1000"))], PATIENCE_S)
    finally:
        await link.close()
    if isinstance(answer, RedisAway):
        raise answer


def _clock(wall_clock: Callable[[], float], stepped_s: float) -> Finding:
    """Tokens and records depend on the wall clock; whether a time server keeps it cannot be seen from here.

    Args:
        wall_clock: Seconds since the epoch.
        stepped_s: Seconds by which it moved against the monotonic clock while the other checks ran.
    """
    with tempfile.TemporaryFile() as file:
        behind_s = os.fstat(file.fileno()).st_mtime - wall_clock()
    installed_at = Path(__file__).stat().st_mtime
    advice = "set this machine's clock and keep it with NTP"
    if abs(stepped_s) > CLOCK_TOLERANCE_S:
        return Finding("clock", "fail", f"it was set by {stepped_s:+.1f} s during these checks", advice)
    if wall_clock() < installed_at - CLOCK_TOLERANCE_S:
        return Finding("clock", "fail", "it is earlier than the installed files", advice)
    if abs(behind_s) > CLOCK_TOLERANCE_S:
        return Finding("clock", "fail", f"it is {behind_s:+.1f} s off the file system's", advice)
    return Finding("clock", "ok", "agrees with the files' times; whether NTP keeps it is not seen from here")
