"""What is measured: a system that can be started on a model and asked in one or more lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.cpu import Role
from benchmarks.peers.served import ServedModel
from benchmarks.request import Request
from serve_app.contract import FloatArray


@dataclass(frozen=True, slots=True)
class Lane:
    """One way to ask a system: a protocol and a body.

    Attributes:
        method, path, headers: Of the request.
        body: The body that asks for windows float32[B,F,T].
        probabilities: The class probabilities [B,C] in a response.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Callable[[FloatArray], bytes]
    probabilities: Callable[[httpx.Response], npt.NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Running:
    """A system that is up.

    Attributes:
        port: Where it listens on loopback.
        lanes: How it is asked, by name.
        roots: Its processes; everything below them is its own too.
        role: Names what each process is for.
        facts: What else it tells of itself, asked when a load is over; plain values for JSON.
    """

    port: int
    lanes: Mapping[str, Lane]
    roots: tuple[int, ...]
    role: Role = lambda pid, command: "server"
    facts: Callable[[], dict[str, Any]] = field(default=dict)

    def request(self, lane: str, windows: FloatArray) -> Request:
        """The request for these windows in a lane."""
        how = self.lanes[lane]
        return Request(self.port, how.method, how.path, how.headers, how.body(windows))


class System(Protocol):
    """Something that serves models.

    Attributes:
        name: How it is called in the results.
        lanes: Names of the ways it can be asked in.
    """

    name: str
    lanes: tuple[str, ...]

    def start(self, model: ServedModel, folder: Path) -> AbstractContextManager[Running]:
        """Start it and wait until it answers; its whole process tree is gone when the context ends.

        Args:
            model: What it serves.
            folder: An existing folder for its logs and state.

        Raises:
            NotUp: It did not come up.
        """
