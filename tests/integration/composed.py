"""The services of docker-compose.yml as processes of this host: their commands, environments and health checks.

What stands for a place in a container stands for one here: service names for loopback addresses, ports for free ones,
mounted paths for folders. Nothing else is changed, and nothing of our own environment reaches the services.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from app.local_ray import descendants
from tests.integration.processes import ROOT, free_port, wait_until

EDGE = ROOT / "docker" / "edge"
USER = 10001  # of our images
HEALTHY_LIMIT_S = 90.0
COMPLETED_LIMIT_S = 120.0


def read_compose() -> dict[str, Any]:
    """The compose file with its anchors resolved."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


class Composed:
    """All services, each started when those that it depends on are in the state that it names; ended together."""

    # Ray takes 127.0.0.1 for a mistake in a cluster of several nodes and looks for another address of the host.
    HEAD, WORKER, GATEWAY_NODE = "127.0.0.2", "127.0.0.3", "127.0.0.4"

    def __init__(self) -> None:
        self._services: dict[str, Any] = read_compose()["services"]
        # Short, because Ray puts Unix sockets below it; Ray opens its folders to everybody, this one stays closed.
        self._folder = Path(tempfile.mkdtemp(prefix="compose-", dir="/tmp"))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._gcs, self._dashboard, self._redis, self._gateway, self._edge = (str(free_port()) for _ in range(5))
        self.gateway_url = f"http://127.0.0.1:{self._gateway}"
        self.edge_url = f"https://127.0.0.1:{self._edge}"
        self.dashboard_url = f"http://{self.HEAD}:{self._dashboard}"
        self.secrets = self._folder / "secrets"
        self._local = {name: self._places(name) for name in self._services}

    def __enter__(self) -> Composed:
        try:
            subprocess.run([ROOT / "docker" / "make-secrets.sh", self.secrets], check=True)
            self._open_to_edge()
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run(self, service: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        """What `docker compose exec SERVICE COMMAND` does."""
        return subprocess.run(
            self._mapped(service, command), **self._surroundings(service), capture_output=True, text=True, timeout=30
        )

    def is_healthy(self, service: str) -> bool:
        """Whether the health check of a service passes: the compose file's own, else its image's."""
        test = self._services[service].get("healthcheck", {}).get("test") or self._image_health_check(service)
        command = ["sh", "-c", test[1]] if test[0] == "CMD-SHELL" else test[1:]
        return self.run(service, command).returncode == 0

    def stop(self) -> None:
        for process in reversed(self._running.values()):
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self._running.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_all(self) -> None:
        waits_for = {name: list(service.get("depends_on", {})) for name, service in self._services.items()}
        for name in TopologicalSorter(waits_for).static_order():
            for other, how in self._services[name].get("depends_on", {}).items():
                self._wait(other, how["condition"])
            self._start(name)

    def _start(self, name: str) -> None:
        command = self._mapped(name, self._services[name]["command"])
        if command[:2] == ["ray", "start"]:  # a container has an address of its own, which Ray finds by itself
            command.append(f"--node-ip-address={self._address(name)}")
        with (self._folder / f"{name}.log").open("wb") as log:
            if name == "edge" and os.geteuid() == 0:
                os.fchown(log.fileno(), USER, USER)  # as a container's streams are its user's
            self._running[name] = subprocess.Popen(
                command, **self._surroundings(name), stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, name: str, condition: str) -> None:
        process = self._running[name]
        if condition == "service_healthy":
            wait_until(lambda: self._lives(name) and self.is_healthy(name), HEALTHY_LIMIT_S, f"{name} to be healthy")
        elif condition == "service_completed_successfully":
            assert process.wait(COMPLETED_LIMIT_S) == 0, self.log(name)
        else:
            assert condition == "service_started", condition

    def completes(self, name: str) -> int:
        """Exit status of a service that ends by itself."""
        return self._running[name].wait(COMPLETED_LIMIT_S)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def _lives(self, name: str) -> bool:
        assert self._running[name].poll() is None, f"{name} ended:\n{self.log(name)}"
        return True

    def _address(self, name: str) -> str:
        return {"ray-head": self.HEAD, "ray-worker": self.WORKER, "gateway-node": self.GATEWAY_NODE}[name]

    def _places(self, name: str) -> dict[str, str]:
        """What the places in a service's command and environment are here."""
        folder = self._folder / str(list(self._services).index(name))
        (folder / "state").mkdir(parents=True)
        return {
            "ray-head": self.HEAD,
            "0.0.0.0": self.HEAD if name == "ray-head" else "127.0.0.1",
            "redis:6379": f"127.0.0.1:{self._redis}",
            "6379": self._redis if name == "redis" else self._gcs,
            "8265": self._dashboard,
            "8000": self._gateway,
            "8443": self._edge,
            "8081": str(free_port()),
            "10001": str(free_port()),
            "52365": str(free_port()),
            "172.30.255.243": "127.0.0.1",
            **({"gateway": "127.0.0.1", "/opt/edge": str(folder / "opt")} if name == "edge" else {}),
            "/run/secrets": str(self.secrets),
            "/models": str(ROOT / "models"),
            "/var/lib/sluice": str(folder / "state"),
            "/tmp": str(folder),
        }

    def _mapped(self, service: str, words: list[str]) -> list[str]:
        local = self._local[service]
        pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, local)) + r")(?![\w])")
        return [pattern.sub(lambda match: local[match[0]], word.replace("$$", "$")) for word in words]

    def _surroundings(self, service: str) -> dict[str, Any]:
        declared: Mapping[str, str] = self._services[service].get("environment", {})
        values = self._mapped(service, list(declared.values()))
        folder = self._local[service]["/tmp"]
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/bin"
        image = {"PATH": path, "HOME": folder, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
        user = {"user": USER, "group": USER, "extra_groups": []} if service == "edge" and os.geteuid() == 0 else {}
        return {"cwd": folder, "env": {**image, **dict(zip(declared, values, strict=True))}, **user}

    def _open_to_edge(self) -> None:
        """Nginx will not run as root, unlike the others: its files are its user's, where we are root."""
        folder = Path(self._local["edge"]["/tmp"])
        shutil.copytree(EDGE, folder / "opt")
        if os.geteuid() == 0:
            self._folder.chmod(0o711)
            for path in (self.secrets, folder, *folder.rglob("*")):
                os.chown(path, USER, USER)

    def _image_health_check(self, service: str) -> list[str]:
        build = self._services[service]["build"]
        file = ROOT / build["context"] / build.get("dockerfile", "Dockerfile")
        check = re.search(r"^HEALTHCHECK [^\[]*(\[.*\])$", file.read_text(), re.MULTILINE)
        assert check is not None, f"{file} has no health check"
        return ["CMD", *json.loads(check[1])]
