"""The set-up that needs nothing: a local Ray, a secret of its own, and something to paste when it stands.

What it keeps lies in `.run/` below the working folder: the development secret, the address of the gateway that
runs, its log, and an example request made from the shipped bars.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from app.secret_files import write_once
from app.serve_api import DeployFailed, ServeApi

if TYPE_CHECKING:
    from app.local_ray import LocalRay

RUN_DIR = Path(".run")
SECRET_FILE = RUN_DIR / "jwt_secret"
URL_FILE = RUN_DIR / "gateway_url"
RAY_FILE = RUN_DIR / "ray.json"
EXAMPLE_FILE = RUN_DIR / "window.f32"
LOG_FILE = RUN_DIR / "gateway.log"

_DEPLOY_TIMEOUT_S = 180.0
_GATEWAY_TIMEOUT_S = 60.0


def development_secret() -> Path:
    """The file of the development secret, made with 48 random bytes when it is not there yet."""
    write_once(SECRET_FILE, secrets.token_urlsafe(48).encode())
    return SECRET_FILE


@contextmanager
def announced(url: str, ray: LocalRay) -> Iterator[None]:
    """Leave the running gateway's address, and the way to its Ray, for the other commands, as long as it runs."""
    RUN_DIR.mkdir(mode=0o700, exist_ok=True)
    URL_FILE.write_text(url)
    RAY_FILE.write_text(json.dumps({**ray.environment, "RAY_ADDRESS": ray.address}))
    try:
        yield
    finally:
        for file in (URL_FILE, RAY_FILE):
            file.unlink(missing_ok=True)


def example_request() -> Path:
    """Write the newest window of the shipped MSFT bars as a raw float32 body; returns its absolute path."""
    from serve_app.bars import load_bars  # noqa: PLC0415  # only this start needs the bars
    from serve_app.features import latest_window  # noqa: PLC0415

    EXAMPLE_FILE.write_bytes(latest_window(load_bars("MSFT").ohlcv).tobytes())
    return EXAMPLE_FILE.resolve()


class BackgroundDeploy(threading.Thread):
    """Deploys on the local Ray while the gateway already serves from legacy, then says what can be pasted.

    Args:
        ray: The running local Ray.
        config: Serve configuration to put; its first application is the one waited for.
        gateway_url: Root of the gateway.
        say: Told every line for the operator.
        on_ready: Called once the gateway answers from Ray Serve.
    """

    def __init__(
        self,
        ray: LocalRay,
        config: dict[str, Any],
        *,
        gateway_url: str,
        say: Callable[[str], None],
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(name="deploy", daemon=True)
        self._ray = ray
        self._config = config
        self._gateway_url = gateway_url
        self._say = say
        self._on_ready = on_ready

    def run(self) -> None:
        name = self._config["applications"][0]["name"]
        try:
            with ServeApi(self._ray.dashboard_url, token=self._ray.token_file.read_text()) as api:
                api.put(self._config)
                api.wait_running(name, timeout_s=_DEPLOY_TIMEOUT_S, on_progress=self._say, clock=time.monotonic)
            self._wait_for_both_arms()
        except (DeployFailed, OSError) as error:
            self._say(f"Ray Serve is not up, legacy answers alone: {error}")
            return
        self._on_ready()

    def _wait_for_both_arms(self) -> None:
        """Wait until every arm has answered a probe."""
        deadline = time.monotonic() + _GATEWAY_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                health = httpx.get(f"{self._gateway_url}/health", timeout=2.0, trust_env=False).json()
            except httpx.HTTPError:
                health = {}
            arms = health.get("arms", [])
            if arms and all(arm["status"] in ("healthy", "degraded") for arm in arms):
                return
            time.sleep(0.25)
        raise DeployFailed(
            f"not every arm was healthy after {_GATEWAY_TIMEOUT_S:.0f} s; see {self._gateway_url}/health"
        )
