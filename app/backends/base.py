"""The one narrow seam between the gateway and whatever answers: a `Backend` takes a `Call`, gives an `Answer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.contract import DeadlineExceeded, FloatArray, Options, Prediction

# Most windows of one call; every backend has room for as many to wait.
MAX_CALL_WINDOWS = 1024

# A caller in a greater hurry than this proves nothing by giving up.
FAIR_BUDGET_S = 0.5


class ExpiredInQueue(DeadlineExceeded):
    """The deadline passed in our own queue, or so soon after it that no answer could be expected.

    This says how busy we are, and nothing of the arm.
    """


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a rollout: a backend and, where it serves several, a model version.

    Written `backend` or `backend@version`; without a version the backend's default version answers.
    """

    backend: str
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> Arm:
        backend, _, version = text.partition("@")
        return cls(backend, version or None)

    def __str__(self) -> str:
        return f"{self.backend}@{self.version}" if self.version else self.backend


@dataclass(frozen=True, slots=True)
class Call:
    """One request for predictions, on its way to a backend.

    Attributes:
        windows: float32[B, F, T], C-contiguous, already validated by `as_windows`.
        options: What was asked for beside the prediction.
        deadline: Seconds on the gateway's monotonic clock after which nobody waits for the answer. On Linux
            that clock is one per host, so it may cross to the bridge process as it is; beyond the host
            only a remaining budget may travel.
        request_id: The id the gateway gave the request.
        principal: Keyed hash of who asked, 16 hex digits; never the subject itself.
        version: The model version that must answer, None for the backend's default.
        trace: W3C `traceparent` of the request, or None.
        has_fallback: Another arm answers where this one fails: failing soon is better then than trying for long.
        is_fallback: Another arm has failed it already: it may wait as long as there is time, rather than be refused.
    """

    windows: FloatArray
    options: Options
    deadline: float
    request_id: str
    principal: str
    version: str | None = None
    trace: str | None = None
    has_fallback: bool = False
    is_fallback: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A prediction and where its time went.

    Attributes:
        prediction: For exactly the call's windows, in their order.
        stages_ms: Milliseconds by stage, from the closed set queue (waiting in the gateway for a slot), transport
            (between gateway and model, both ways), batch (waiting at the model) and model (the forward pass).
        groups: For each part of the call, its windows and those of the group in which it was sent.
    """

    prediction: Prediction
    stages_ms: dict[str, float] = field(default_factory=dict)
    groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can answer now.

    Attributes:
        ready: True when a call is expected to be answered.
        reason: `ok` or a code from the closed set of `serve_app.contract` and the backend's own states.
        detail: Figures for `/stats`; JSON-ready, no secrets, no paths.
        versions: Model versions that answer calls which name them; None while that is not known.
    """

    ready: bool
    reason: str = "ok"
    detail: dict[str, Any] = field(default_factory=dict)
    versions: frozenset[str] | None = frozenset()


class Backend(Protocol):
    """Something that answers calls. One per process and name; safe for many concurrent calls on one event loop."""

    name: str

    async def start(self) -> None:
        """Begin getting ready and return at once; readiness shows in `status`. Never raises for a peer's absence."""

    async def stop(self) -> None:
        """Give back processes, threads and sockets. Calls still open fail with `NotReady`."""

    async def predict(self, call: Call) -> Answer:
        """Answer the call before its deadline; the answer has passed `Prediction.check`.

        Cancelling the awaiting task gives the call's place back at once.

        Raises:
            ServingError: One of its subclasses, never anything else. `DeadlineExceeded` at the deadline at the latest.
        """

    def is_ready(self, version: str | None = None) -> bool:
        """Whether an answer is to be expected now, from this version or the default one; cheap, for every call."""

    def status(self) -> BackendStatus:
        """The present state, from memory: no input or output."""

    async def stats(self) -> dict[str, Any]:
        """Counters for operators, JSON-ready, gathered within one second or marked as missing."""
