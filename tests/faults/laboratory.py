"""What the faults are tried on: real processes that scenarios share where the fault before left them whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from app.local_ray import LocalRay, descendants
from app.serve_api import ServeApi
from serve_app.serve_config import ServedApplication, ServedModel, build_config
from tests.faults.toxic import ToxicProxy
from tests.integration.processes import ROOT, GatewayProcess, command_of, replica_pids
from tests.integration.redis_server import RedisServer

RUNNING_TIMEOUT_S = 120.0
# Nobody is limited, and a gateway that is ended between two scenarios need not say so for long.
GENEROUS = {"GATEWAY_RATE_LIMIT": "100000000", "GATEWAY_OPS_RATE_LIMIT": "1000000", "GATEWAY_DRAIN_NOTICE_MS": "100"}
SHIPPED_MODELS = ROOT / "models"


class Laboratory:
    """One Ray, one Redis and one gateway at a time, in a folder of their own; the block's end ends them all.

    Attributes:
        folder: Where everything is kept.
        token_file: The cluster's token, the same for a head that replaces another.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sluice-faults-"))
        self.token_file = self.folder / "ray_token"
        self.secret = secrets.token_urlsafe(48)
        self._cluster: LocalRay | None = None
        self._deployed: dict[str, Any] | None = None
        self._gateway: GatewayProcess | None = None
        self._gateway_settings: dict[str, str] = {}
        self._after: list[Callable[[], Any]] = []
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.renew()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def afterwards(self, undo: Callable[[], Any]) -> None:
        """Have something undone when the scenario is over."""
        self._after.append(undo)

    def clear(self) -> None:
        """Undo what the scenario did, the last first, and all of it; what an undoing raised is raised at the end."""
        errors: list[Exception] = []
        while self._after:
            try:
                self._after.pop()()
            except ProcessLookupError:
                continue
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("not everything could be undone", errors)

    def renew(self) -> None:
        """End everything, so that what comes next finds nothing broken."""
        with contextlib.ExitStack() as endings:  # the last first, each whatever another raises
            endings.callback(self.end_cluster)
            endings.callback(self.end_gateway)
            endings.callback(self.clear)

    def new_folder(self, name: str) -> Path:
        self._number += 1
        folder = self.folder / f"{self._number}-{name}"
        folder.mkdir()
        return folder

    # -- Ray ----------------------------------------------------------------------------------------------------------

    @property
    def cluster(self) -> LocalRay:
        if self._cluster is None:
            self.start_head(self.plan_head())
        assert self._cluster is not None
        return self._cluster

    def plan_head(self) -> LocalRay:
        """A cluster whose address is known and where nobody listens yet; at the place of the one before, if any."""
        planned = LocalRay(num_cpus=8)  # logical ones, so that several small replicas fit
        if self._cluster is not None:
            planned._ports = self._cluster._ports
        if not self.token_file.exists():
            self.token_file.touch(mode=0o600)
            self.token_file.write_text(planned.token_file.read_text())
        planned.token_file.write_text(self.token_file.read_text())
        return planned

    def start_head(self, planned: LocalRay) -> None:
        planned.start()
        self._cluster, self._deployed = planned, None

    def kill_head(self) -> None:
        """Kill every process of the cluster."""
        assert self._cluster is not None
        self._cluster.stop()
        self._deployed = None

    def replace_head(self) -> None:
        """A new and empty cluster where the old one was."""
        self.start_head(self.plan_head())

    def end_cluster(self) -> None:
        if self._cluster is not None:
            self._cluster.stop()
            self._cluster = None
            self._deployed = None

    def api(self) -> ServeApi:
        return ServeApi(self.cluster.dashboard_url, token=self.token_file.read_text())

    def deploy(self, config: dict[str, Any]) -> None:
        """Put a configuration where it is not already, and wait until its application runs."""
        if config == self._deployed:
            return
        self._deployed = None
        with self.api() as api:
            api.put(config)
            name = config["applications"][0]["name"]
            api.wait_running(name, timeout_s=RUNNING_TIMEOUT_S, on_progress=lambda _: None, clock=time.monotonic)
        self._deployed = config

    def forget_deployment(self) -> None:
        """What is deployed is not what it was."""
        self._deployed = None

    def running_replicas(self) -> list[int]:
        """Process ids."""
        return replica_pids(self.cluster)

    def cluster_process(self, word: str) -> int:
        """The process of the cluster with this word in its command line or its title."""
        return next(pid for pid in descendants(self.cluster.pid) if word in command_of(pid))

    @property
    def ray_environment(self) -> dict[str, str]:
        return self.join(self.cluster)

    def join(self, cluster: LocalRay) -> dict[str, str]:
        """What a gateway needs to join a cluster and the one that replaces it."""
        return {**cluster.environment, "RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    # -- The gateway --------------------------------------------------------------------------------------------------

    def gateway(self, settings: Mapping[str, str], **how: Any) -> GatewayProcess:
        """The running gateway if it has these settings, else a new one.

        Args:
            settings: Environment; with a generous rate limit unless it says otherwise.
            how: Further arguments of `GatewayProcess`; with any, the gateway is a new one.
        """
        wanted = {**GENEROUS, **settings}
        if how or self._gateway is None or not self._gateway.is_alive() or wanted != self._gateway_settings:
            self.end_gateway()
            self._gateway = GatewayProcess(self.new_folder("gateway"), wanted, secret=self.secret, **how)
            self._gateway_settings = {} if how else wanted
        return self._gateway

    def end_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.stop()
            self._gateway = None

    def newest_log(self) -> Path | None:
        """Of the gateways so far, the one that wrote last."""
        return max(self.folder.glob("*/gateway.log"), key=lambda log: log.stat().st_mtime, default=None)

    # -- Redis and the network ----------------------------------------------------------------------------------------

    def redis(self) -> RedisServer:
        server = RedisServer(self.new_folder("redis"))
        self.afterwards(server.kill)
        server.start()
        return server

    def proxy(self, port: int) -> ToxicProxy:
        proxy = ToxicProxy(port)
        self.afterwards(proxy.close)
        return proxy


def bridges_of(gateway: GatewayProcess) -> list[int]:
    return [pid for pid in descendants(gateway.pid) if "app.backends.bridge" in command_of(pid)]


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def rss_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def freeze(lab: Laboratory, pid: int) -> None:
    """Stop a process as a hang would; it goes on when the scenario is over, if it is still there."""
    os.kill(pid, signal.SIGSTOP)
    lab.afterwards(lambda: os.kill(pid, signal.SIGCONT))


def stub_application(
    *, engine: str = "sleep", replicas: int = 2, registry: Path = SHIPPED_MODELS, **model: Any
) -> dict[str, Any]:
    """The deployment with so many replicas, neither more nor less."""
    served = ServedModel(registry_path=str(registry), engine=engine, **model)  # type: ignore[arg-type]
    config = build_config(ServedApplication(serves=served))
    scaling = config["applications"][0]["deployments"][0]["autoscaling_config"]
    scaling |= {"min_replicas": replicas, "max_replicas": replicas}
    return config


def run_python(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **how)
