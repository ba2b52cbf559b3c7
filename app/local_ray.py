"""A Ray of our own for one machine: started as a child, reachable over loopback only, gone when we are.

`ray stop` is never used: it ends every Ray on the host, and other people's clusters live there too.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from app.parent import end_with_parent
from serve_app.serve_config import SERVE_ENV

_LOOPBACK = "127.0.0.1"
_PORTS = range(20_000, 32_768)
# What Ray reads when it is imported, the same for every local Ray and every driver of one.
LOCAL_ENV = {
    **SERVE_ENV,
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 makes replicas wait for everything else on the machine
    # Else Ray replaces a loopback address by the host's own and listens on all of them; the name is of its first use.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

_END_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 256 * 1024 * 1024  # a group of 32 windows is 0.4 MB and travels in the message itself


class LocalRayFailed(Exception):
    """Ray could not be started; the message is one plain line."""


class LocalRay:
    """A one-node Ray cluster in a child process (`ray start --head --block`).

    Every port is a free one, every listener is on loopback, and token authentication is on with a token
    of its own, so that neither another user of the host nor another cluster on it gets in the way.

    Args:
        num_cpus: CPUs that the node reports to Ray's scheduler; 0 or more.
        environment: Variables added to the child's environment, on top of `LOCAL_ENV`.
    """

    def __init__(self, *, num_cpus: int, environment: Mapping[str, str] | None = None) -> None:
        # Ray puts Unix sockets below this folder, and their paths may have 107 bytes: hence not below the project.
        # It also opens the folder that it is given to everybody, so it gets one inside ours, which stays closed.
        self.directory = Path(tempfile.mkdtemp(prefix="sluice-ray-", dir="/tmp"))
        self.token_file = self.directory / "auth_token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self._num_cpus = num_cpus
        self._extra_environment = dict(environment or {})
        self._ports = free_ports(7)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where drivers join: `host:port` of the cluster's control store."""
        return f"{_LOOPBACK}:{self._ports[0]}"

    @property
    def dashboard_url(self) -> str:
        """Root of the REST interface that takes Serve configurations."""
        return f"http://{_LOOPBACK}:{self._ports[1]}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What a driver process needs in its environment to join this cluster."""
        return {**LOCAL_ENV, "RAY_AUTH_TOKEN_PATH": str(self.token_file), **self._extra_environment}

    def start(self, timeout_s: float = 90.0) -> None:
        """Start the cluster and wait until it takes Serve configurations.

        Raises:
            LocalRayFailed: The child ended, or was not ready after `timeout_s` seconds.
        """
        log = self.directory / "ray-start.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603  # every word of the command is ours
                self._command(),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C at the terminal reaches the gateway first, which then ends Ray in order.
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509  # one system call, made before threads exist
            )
        deadline = time.monotonic() + timeout_s
        while not self._takes_configurations():
            if self._process.poll() is not None:
                raise LocalRayFailed(f"Ray ended while starting (exit code {self._process.returncode}); see {log}")
            if time.monotonic() > deadline:
                raise LocalRayFailed(f"Ray was not ready after {timeout_s:.0f} s; see {log}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the cluster's processes and remove its folder; safe to call twice.

        They are killed: asked to end, Ray waits 20 seconds for its workers, and nothing here is worth keeping.
        """
        if self._process is not None:
            family = [self._process.pid, *descendants(self._process.pid)]  # parents first: they start no more children
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            _wait_for_end(family, _END_TIMEOUT_S)
            self._process = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> LocalRay:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        gcs, dashboard, agent_http, agent_grpc, runtime_env, metrics, client = self._ports
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--node-ip-address={_LOOPBACK}", f"--port={gcs}", f"--num-cpus={self._num_cpus}"),
            *(f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent_http}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"),
            *(f"--ray-client-server-port={client}", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
            *(f"--temp-dir={self.directory / 'ray'}", "--disable-usage-stats", "--include-log-monitor=false"),
        ]

    def _takes_configurations(self) -> bool:
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        try:
            url = f"{self.dashboard_url}/api/serve/applications/"
            return httpx.get(url, headers=headers, timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; all are held until the last is known, so that they differ.

    Ray binds some of them seconds later. They are taken from between Ray's own worker ports and the range that the
    kernel gives to outgoing connections, since any connection of those seconds could else have become one of them,
    and a node whose agents find a port taken ends itself.
    """
    free: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.sample(_PORTS, len(_PORTS)):
            listener = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind((_LOOPBACK, port))
                free.append(port)
            if len(free) == count:
                return free
    raise LocalRayFailed(f"fewer than {count} ports from {_PORTS.start} to {_PORTS.stop - 1} are free")


def descendants(pid: int) -> list[int]:
    """Process ids of everything below `pid`, read from /proc; processes that end meanwhile are left out."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(child) for child in task.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def _wait_for_end(pids: list[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
