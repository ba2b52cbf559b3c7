"""When to stop asking an arm, and when to ask it again.

             three failures in a row, or it says itself that it cannot answer
    CLOSED ───────────────────────────────────────────────────────────────────► OPEN ◄─┐
       ▲                                                                          │    │ the same again
       └───── a share of the calls that grows: 10, 25, 50 % ── RECOVERING ◄───────┘────┘
                                                          a probe was answered

An open arm refuses at once what it would otherwise keep until its deadline. It is tried again by probes alone, off the
request path, and nobody needs to restart anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any

from app.backends.base import FAIR_BUDGET_S, Answer, Backend, BackendStatus, Call, ExpiredInQueue
from serve_app.contract import (
    ERRORS_BY_CODE,
    DeadlineExceeded,
    InvalidWindows,
    ModelFailed,
    ModelNotFound,
    ModelOutputInvalid,
    NotReady,
    OutOfMemory,
    Overloaded,
    ServingError,
    Unavailable,
)

FAILURES_UNTIL_OPEN = 3
SILENCE_S = 0.25  # a part of an arm may fail while the rest answers: only an arm that answers nobody is left alone
PROBE_PAUSE_S = 0.5  # between probes that calls give a reason for

STEPS = (0.1, 0.25, 0.5)
STEP_S = 0.25

MAX_VERSIONS = 32
FORGOTTEN_S = 60.0  # a version that nobody has asked for so long is probed no more


class State(Enum):
    """What a breaker lets through: the value is that of its gauge."""

    CLOSED = 0
    RECOVERING = 1
    OPEN = 2


class Verdict(Enum):
    """What a failed call says of the arm."""

    NOTHING = 0
    DOUBT = 1
    FAILURE = 2


# The caller's own fault, and our own shedding.
_NOTHING = (InvalidWindows, ModelNotFound, Overloaded, ExpiredInQueue)
# The arm answered, though nothing of use. That may be due to the caller's windows, or to how many they are, and a
# stranger must not be able to take the arm from everybody else: a probe, with one good window, tells whether it is the
# arm.
_DOUBT = (ModelFailed, ModelOutputInvalid, OutOfMemory)


def verdict_on(error: ServingError, budget_s: float) -> Verdict:
    """What the failure of a call says that had so many seconds for its answer."""
    if isinstance(error, _NOTHING):
        return Verdict.NOTHING
    is_hasty = isinstance(error, DeadlineExceeded) and budget_s < FAIR_BUDGET_S
    return Verdict.DOUBT if is_hasty or isinstance(error, _DOUBT) else Verdict.FAILURE


class Breaker:
    """The state of one arm, or of one model version on it, as a pure machine over a clock.

    Args:
        clock: Monotonic seconds.
        on_change: Told each new state, with the code of the failure that led to it.

    Attributes:
        state: See the module's text.
        reason: Code of the failure that opened it last, `ok` while it is closed.
        is_suspect: Something failed that only a probe can tell the meaning of.
        epoch: Counts the changes of state. What was sent in an earlier epoch says nothing of this one.
        openings: How often it opened.
        asked_at: When a call last came for the version that it stands for.
    """

    def __init__(
        self, clock: Callable[[], float], on_change: Callable[[State, str], None] = lambda state, reason: None
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self.state = State.CLOSED
        self.reason = "ok"
        self.is_suspect = False
        self.epoch = 0
        self.openings = 0
        self.asked_at = clock()
        self._failures = 0
        self._doubts = 0
        self._has_served = False
        self._last_success = -math.inf
        self._changed_at = -math.inf
        self._credit = 0.0

    def admits(self, *, has_fallback: bool) -> bool:
        """Whether a call may go to the arm now.

        A recovering arm gets a growing share of the calls that another arm answers as well. Calls that nobody else
        answers are all let through: refusing them would cost answers, and the arm's own queue, with few slots and a
        bounded wait, keeps them from trampling it.
        """
        step = self.tick()
        if self.state is State.RECOVERING and has_fallback:
            self._credit += STEPS[step]
            if self._credit < 1.0:
                return False
            self._credit -= 1.0
        return self.state is not State.OPEN

    def tick(self) -> int:
        """Take note of the time: a recovering arm has recovered after a while. Returns the step it is at."""
        if self.state is not State.RECOVERING:
            return 0
        step = int((self._clock() - self._changed_at) / STEP_S)
        if step >= len(STEPS):
            self._change(State.CLOSED, "ok")
        return step

    def succeed(self) -> None:
        """A call was answered."""
        self._failures = self._doubts = 0
        self.is_suspect = False
        self._has_served = True
        self._last_success = self._clock()

    def fail(self, code: str, verdict: Verdict) -> None:
        """A call failed."""
        if verdict is Verdict.FAILURE:
            self._failures += 1
            is_silent = self._clock() - self._last_success >= SILENCE_S
            if self._failures >= FAILURES_UNTIL_OPEN and is_silent:
                self.open(code)
        elif verdict is Verdict.DOUBT:
            self._doubts += 1
            self.is_suspect |= self._doubts >= FAILURES_UNTIL_OPEN

    def pass_probe(self) -> None:
        """A probe was answered: an arm that has served before comes back step by step, a new one at once."""
        if self.state is State.OPEN:
            self._credit = 1.0  # the first call is let through
            if self._has_served:
                self._change(State.RECOVERING, self.reason)
            else:
                self._change(State.CLOSED, "ok")
        self.succeed()

    def fail_probe(self, code: str) -> None:
        """A probe failed: the second in a row opens, or the first after what calls gave reason to doubt."""
        if self.is_suspect:
            self.open(code)
        self.is_suspect = True

    def open(self, code: str) -> None:
        """Refuse calls from now on."""
        if self.state is not State.OPEN:
            self.openings += 1
            self._change(State.OPEN, code)

    @property
    def is_doubted(self) -> bool:
        """Whether a probe would tell something that is not known."""
        return self.is_suspect or self.state is State.OPEN

    def _change(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changed_at = self._clock()
        self._failures = self._doubts = 0
        self.epoch += 1
        self._on_change(state, reason)


class Guarded:
    """A backend behind a breaker for what it serves by default, and one for each model version that calls name.

    Args:
        backend: What answers.
        clock: Monotonic seconds, the clock of the calls' deadlines.
        on_change: Told the arm's name, its new state and the code of the failure that led to it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[str, State, str], None] = lambda arm, state, reason: None,
    ) -> None:
        self.name = backend.name
        self._backend = backend
        self._clock = clock
        self._breaker = Breaker(clock, lambda state, reason: on_change(self.name, state, reason))
        self._by_version: dict[str, Breaker] = {}
        self._probing: dict[str, asyncio.Task[None]] = {}
        self._was_ready = False
        self._probed_at = -math.inf

    async def start(self) -> None:
        await self._backend.start()

    async def stop(self) -> None:
        for probing in self._probing.values():
            probing.cancel()
        await asyncio.gather(*self._probing.values(), return_exceptions=True)
        await self._backend.stop()

    async def predict(self, call: Call) -> Answer:
        """As the backend, and at once what it is known to fail at."""
        breaker = self._breaker if call.version is None else self._of_version(call.version)
        if breaker.state is not State.CLOSED and not breaker.admits(has_fallback=call.has_fallback):
            raise _refusal(breaker.reason)
        epoch, started = breaker.epoch, self._clock()
        try:
            answer = await self._backend.predict(call)
        except ServingError as error:
            if breaker.epoch == epoch:
                self._note_failure(breaker, call, error, call.deadline - started)
            raise
        if breaker.epoch == epoch:
            breaker.succeed()
        return answer

    async def probe(self, call: Call) -> Answer:
        """Ask the backend whatever its breaker says, and tell the breaker; doubtful versions are asked beside it.

        Args:
            call: One good window, for the default version.

        Raises:
            ServingError: As `predict`, for the default version.
        """
        self._probed_at = self._clock()
        self._was_ready = self._backend.is_ready()
        self._forget_versions()
        for version, breaker in self._by_version.items():
            if breaker.is_doubted and version not in self._probing:
                self._probing[version] = asyncio.create_task(self._probe_version(breaker, version, call))
        return await self._probe(self._breaker, call)

    def _forget_versions(self) -> None:
        """Drop what is served no more, and what nobody asks for."""
        served, now = self._backend.status().versions, self._clock()
        for version, breaker in list(self._by_version.items()):
            if (served is not None and version not in served) or now - breaker.asked_at >= FORGOTTEN_S:
                del self._by_version[version]

    async def _probe_version(self, breaker: Breaker, version: str, call: Call) -> None:
        try:
            with contextlib.suppress(ServingError):  # the breaker has been told
                await self._probe(breaker, replace(call, version=version))
        finally:
            self._probing.pop(version, None)

    async def _probe(self, breaker: Breaker, call: Call) -> Answer:
        try:
            answer = await self._backend.predict(call)
        except ServingError as error:
            if call.version is None and not self._backend.is_ready():
                breaker.open(NotReady.code)
            elif verdict_on(error, math.inf) is not Verdict.NOTHING:
                breaker.fail_probe(error.code)
            raise
        breaker.pass_probe()
        return answer

    def wants_probe(self) -> bool:
        """Whether a probe should not wait for its turn: calls have failed, or the backend says that it is back."""
        self._breaker.tick()
        if not self._was_ready and self._backend.is_ready():
            return True
        is_doubted = any(breaker.is_doubted for breaker in (self._breaker, *self._by_version.values()))
        return is_doubted and self._clock() - self._probed_at >= PROBE_PAUSE_S

    def is_ready(self, version: str | None = None) -> bool:
        """As the backend, and not while the breaker of what would answer is open."""
        breaker = self._breaker if version is None else self._by_version.get(version)
        is_open = breaker is not None and breaker.state is State.OPEN
        return not is_open and self._backend.is_ready(version)

    def status(self) -> BackendStatus:
        """The backend's own status; not ready either while its breaker is open."""
        status = self._backend.status()
        detail = {**status.detail, "breaker": self._describe()}
        if status.ready and self._breaker.state is State.OPEN:
            return BackendStatus(False, self._breaker.reason, detail, status.versions)
        return BackendStatus(status.ready, status.reason, detail, status.versions)

    async def stats(self) -> dict[str, Any]:
        return {**await self._backend.stats(), "breaker": self._describe()}

    def _note_failure(self, breaker: Breaker, call: Call, error: ServingError, budget_s: float) -> None:
        verdict = verdict_on(error, budget_s)
        if call.version is not None and isinstance(error, NotReady):
            return  # refused at once: it is not there, or being loaded
        if call.version is None and verdict is Verdict.FAILURE and not self._backend.is_ready():
            breaker.open(NotReady.code)
        else:
            breaker.fail(error.code, verdict)

    def _of_version(self, version: str) -> Breaker:
        if version not in self._by_version:
            if len(self._by_version) >= MAX_VERSIONS:
                del self._by_version[next(iter(self._by_version))]
            self._by_version[version] = Breaker(self._clock)
        breaker = self._by_version[version]
        breaker.asked_at = self._clock()
        return breaker

    def _describe(self) -> dict[str, Any]:
        breaker = self._breaker
        versions = {
            version: of.state.name.lower() for version, of in self._by_version.items() if of.state is not State.CLOSED
        }
        return {
            "state": breaker.state.name.lower(),
            "reason": breaker.reason,
            "openings": breaker.openings,
            **({"versions": versions} if versions else {}),
        }


def _refusal(code: str) -> ServingError:
    """What an arm that is left alone answers: as it failed, but for what is not to be said before there was a try."""
    kind = ERRORS_BY_CODE[code]
    return (Unavailable if kind in _NEEDS_A_TRY else kind)("this arm fails, and is asked again when it answers a probe")


_NEEDS_A_TRY = (DeadlineExceeded, ServingError)
