"""Real processes for the integration tests: a gateway as an operator starts it, a deployment as an operator puts it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from app.auth import mint_token
from app.local_ray import LocalRay, free_ports
from app.serve_api import ServeApi
from serve_app.contract import APP_NAME
from serve_app.serve_config import ServedApplication, build_config

ROOT = Path(__file__).parents[2]


def deploy(cluster: LocalRay, application: ServedApplication) -> None:
    """Put an application onto a cluster and wait until it runs."""
    with ServeApi(cluster.dashboard_url, token=cluster.token_file.read_text()) as api:
        api.put(build_config(application))
        api.wait_running(application.name, timeout_s=120, on_progress=print, clock=time.monotonic)


def replica_pids(cluster: LocalRay, app: str = APP_NAME) -> list[int]:
    """Process ids of an application's running replicas."""
    with ServeApi(cluster.dashboard_url, token=cluster.token_file.read_text()) as api:
        return running_pids(replica_rows(api, app))


def replica_rows(api: ServeApi, app: str) -> list[dict[str, Any]]:
    """An application's replicas in every state, as Serve reports them."""
    deployments = api.application(app).get("deployments", {}).values()
    return [replica for deployment in deployments for replica in deployment["replicas"]]


def running_pids(rows: Iterable[dict[str, Any]]) -> list[int]:
    """Of replicas that run; Serve says of a dead one for a while that it does."""
    return [row["pid"] for row in rows if row["state"] == "RUNNING" and command_of(row["pid"])]


def command_of(pid: int) -> str:
    """A process's command line or title; empty where there is no process, or only its remains."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class GatewayProcess:
    """`sluice serve` as an operator starts it, in a folder of its own.

    Args:
        folder: Where it runs and keeps its state and its log.
        environment: Settings, on top of this process's environment.
        port: To listen on; a free one unless given.
        secret: Of its tokens; a random one unless given.
        under: A command that runs the command that follows it, `prlimit --nofile=128` for example.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        port: int | None = None,
        secret: str | None = None,
        under: Sequence[str] = (),
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._secret = secret or secrets.token_urlsafe(48)
        self.log = folder / "gateway.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*mortal(), *under, sys.executable, "-m", "app.cli", "serve", "--port", str(self.port)],
                cwd=folder,
                env={
                    **os.environ,
                    "MODEL_REGISTRY_PATH": str(ROOT / "models"),
                    "GATEWAY_JWT_SECRET": self._secret,
                    "GATEWAY_DRAIN_NOTICE_MS": "0",  # nobody is there to be told
                    **environment,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    @property
    def pid(self) -> int:
        """The supervisor, which lives as long as the gateway does."""
        return self._process.pid

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, oldest first."""
        pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def headers(self, scopes: str = "predict ops admin", subject: str = "desk") -> dict[str, str]:
        token = mint_token(
            self._secret.encode(),
            subject=subject,
            scopes=scopes.split(),
            issuer="sluice",
            audience="sluice",
            lifetime_s=3600,
            now=time.time(),
        )
        return {"Authorization": f"Bearer {token}"}

    def client(self, scopes: str = "predict ops admin") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers(scopes), timeout=10.0, trust_env=False)

    def arm_status(self, arm: str) -> str:
        """What `/health` says of one arm; `away` while nobody listens."""
        try:
            arms = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).json()["arms"]
        except httpx.HTTPError:
            return "away"
        return next((row["status"] for row in arms if row["arm"] == arm), "missing")

    def wait_for(self, arm: str, timeout_s: float = 60.0) -> float:
        """Wait until an arm answers its probes; returns the seconds since the gateway's start."""
        wait_until(lambda: self.arm_status(arm) in ("healthy", "degraded"), timeout_s, f"{arm} to answer")
        return time.monotonic() - self.started_at

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the supervisor, its workers and all that they began, as when a machine is gone."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        if self.is_alive():
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


def mortal() -> Sequence[str]:
    """What runs a command that has to end with the thread that began it, however that ends; nothing elsewhere."""
    program = shutil.which("setpriv")  # of util-linux
    return () if program is None else (program, "--pdeathsig", "TERM")


def free_port() -> int:
    """A port of loopback for a process that can only be told a number; no outgoing connection takes it meanwhile."""
    return free_ports(1)[0]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll a real process; the limit is a safety net, far above what is expected."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)
