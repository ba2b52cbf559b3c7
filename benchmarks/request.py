"""One HTTP request, prebuilt, and what is written down of a load of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

HOST = "127.0.0.1"  # load goes to loopback, always

Loop = Literal["closed", "open"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent, the same bytes each time."""

    port: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.path}"

    def encode(self) -> bytes:
        """The request as HTTP/1.1 bytes."""
        fields = {"Host": f"{HOST}:{self.port}", **self.headers, "Content-Length": str(len(self.body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{self.method} {self.path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + self.body


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one load.

    Attributes:
        loop: Closed: each connection asks again once it is answered. Open: requests are due whatever the server does.
        seconds: How long requests were sent.
        answered: Requests answered with 200.
        failed: All others by HTTP status or what happened; none is dropped.
        latency_ms: `p50`, `p90`, `p99`, `max` and more; open loop: of the answered, from when a request was due; closed
            loop: of refusals too, as wrk has it.
        due_rps: Requests due per second in the open loop.
        late_ms: The same figures of how late the generator sent what had a free connection: its own fault.
        generator_cpu_s: CPU seconds of the generator.
    """

    loop: Loop
    seconds: float
    answered: int
    failed: dict[str, int]
    latency_ms: dict[str, float | None]
    due_rps: float | None = None
    late_ms: dict[str, float | None] | None = None
    generator_cpu_s: float = 0.0

    @property
    def answered_rps(self) -> float:
        return self.answered / self.seconds

    def row(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "answered_rps": self.answered_rps}
