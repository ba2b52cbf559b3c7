"""What is measured: a system that can be started on a model and asked in one or more lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.cpu import Role
from benchmarks.peers.catalogue import Model, Peer
from benchmarks.peers.lanes import Lane
from benchmarks.processes import NotUp, free_port, running, wait_until_answered
from benchmarks.request import HOST, Request
from serve_app.contract import FloatArray

_START_TIMEOUT_S = 120.0


def ray_role(command: str, otherwise: str) -> str:
    """What a process of a system on Ray is for, by its command line."""
    if "ray::ServeReplica" in command:
        return "replica"
    is_ray = any(part in command for part in ("ray::", "ray-dashboard", "/ray/", "ray.scripts", "ray.util", "raylet"))
    return "ray system" if is_ray else otherwise


@dataclass(frozen=True)
class Running:
    """A system that is up.

    Attributes:
        port: Where it listens on loopback.
        lanes: How it is asked, by name.
        roots: Its processes; everything below them is its own too.
        role: Names what each process is for.
        facts: Counters that it keeps of itself, asked before and after a load; plain values for JSON.
        operator_token: Bearer token of whoever may change what it does; empty where there is no such thing.
        prepared: Requests that were checked and warmed up, by lane and windows.
    """

    port: int
    lanes: Mapping[str, Lane]
    roots: tuple[int, ...]
    role: Role
    facts: Callable[[], dict[str, Any]] = field(default=dict)
    operator_token: str = ""
    prepared: dict[tuple[str, int], Request] = field(default_factory=dict)

    def request(self, lane: str, windows: FloatArray) -> Request:
        """The request for these windows in a lane."""
        how = self.lanes[lane]
        return Request(self.port, how.method, how.path, how.headers, how.body(windows))


class System(Protocol):
    """Something that serves models.

    Attributes:
        name: How it is called in the results.
        title: How tables call it.
        lanes: Names of the ways it can be asked in.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def lanes(self) -> tuple[str, ...]: ...

    def start(self, model: Model, folder: Path) -> AbstractContextManager[Running]:
        """Start it and wait until it answers; its whole process tree is gone when the context ends.

        Args:
            model: What it serves.
            folder: An existing folder for its logs and state.

        Raises:
            NotUp: It did not come up.
        """


class PeerSystem:
    """A peer of the catalogue as a system."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.name = peer.name
        self.title = peer.title
        self.lanes: tuple[str, ...] = tuple(peer.lanes)

    @contextmanager
    def start(self, model: Model, folder: Path) -> Iterator[Running]:
        """As `System.start`."""
        lanes: dict[str, Lane] = {str(name): lane for name, lane in self._peer.lanes.items()}
        peer, port, log = self._peer, free_port(), folder / f"{self.name}.log"
        if not peer.is_installed:
            raise NotUp(f"{peer.title} is not installed: there is no {peer.python}; see benchmarks/peers/README.md")
        command = peer.command(port, model)
        with running(command, folder=folder, environment=peer.environment, log=log) as process:
            wait_until_answered(f"http://{HOST}:{port}{peer.ready}", process, timeout_s=_START_TIMEOUT_S, log=log)
            yield Running(port, lanes, (process.pid,), lambda pid, command: ray_role(command, "server"))
