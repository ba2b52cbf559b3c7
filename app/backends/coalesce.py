"""Many callers, few sends: calls that wait while the backend is busy leave together, as one group of windows.

The rule has no timer. While fewer than `max_in_flight` groups are under way, a call leaves on the next turn of the
event loop, together with whatever arrived in the same turn. While all are under way, calls gather, and leave when one
comes back: the busier the backend, the fuller the groups, and nobody waits for company.

    predict ─ admitted? ─ parts ──► fair queue ── group ──► send ──► rows back to each caller
                          split at   one lane per           checked once
                 max_group_windows   (version, options)

Nobody waits for long either: what would wait longer than what is under way, or than `max_wait_s`, or past its
deadline, at the pace at which groups come back now, is refused on arrival (`admission`). So a flood costs the flood its
answers, and not those who were admitted their latency.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from app.backends.admission import Admission, Pace
from app.backends.base import FAIR_BUDGET_S, Answer, Call, ExpiredInQueue
from app.backends.waiting import FairQueue
from serve_app.contract import (
    DeadlineExceeded,
    FloatArray,
    ModelFailed,
    ModelOutputInvalid,
    NotReady,
    Options,
    Prediction,
    ServingError,
    Unavailable,
)

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Part:
    """Consecutive windows of one call that travel in one group; most calls are one part.

    Attributes:
        call: The call they belong to.
        windows: float32[n, F, T], a view of the call's windows, 1 <= n <= `max_group_windows`.
    """

    call: Call
    windows: FloatArray
    _caller: _Caller = field(repr=False)
    _prediction: Prediction | None = field(default=None, repr=False)
    _group_windows: int = field(default=0, repr=False)
    _flight: _Flight | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str | None, Options]:
        return self.call.version, self.call.options

    @property
    def principal(self) -> str:
        return self.call.principal

    @property
    def n_windows(self) -> int:
        return len(self.windows)


@dataclass(slots=True)
class Group:
    """What is sent at once: parts of calls that want the same thing from the same model version.

    Attributes:
        deadline: Seconds on the monotonic clock: the latest of the callers'; past it nobody waits for any row.
        was_retried: Set when it had to begin anew, by `send` too: the time that took says nothing of the pace.
        is_repeat: Its parts have been sent before, in a group on which the model failed.
    """

    version: str | None
    options: Options
    deadline: float
    parts: tuple[Part, ...]
    was_retried: bool = False
    is_repeat: bool = False

    @classmethod
    def of(cls, parts: tuple[Part, ...], *, is_repeat: bool = False) -> Group:
        first = parts[0].call
        deadline = max(part.call.deadline for part in parts)
        return cls(first.version, first.options, deadline, parts, is_repeat=is_repeat)

    @property
    def has_fallback(self) -> bool:
        """Whether every caller is answered elsewhere when this group fails."""
        return all(part.call.has_fallback for part in self.parts)

    @property
    def n_windows(self) -> int:
        return sum(len(part.windows) for part in self.parts)


Send = Callable[[Group], Awaitable[Prediction]]


class Coalescer:
    """Gathers calls for one destination into groups and gives every caller its own rows.

    A failing group fails the callers in it and nobody else; when it is the model that failed, each is sent once more
    by itself, so that one bad call fails alone. A caller who is cancelled, or whose deadline passes, leaves at once;
    when the last caller of a group under way has left, its `send` is cancelled.

    Args:
        send: Answers one group; given the windows of its parts in order, it returns one row for each.
        max_group_windows: Most windows in one group; larger calls are split and put together again.
        max_in_flight: Most groups under way at a time; the attribute may be changed at any time.
        max_queued_windows: Most windows waiting for a slot before a call and with it; beyond them it is refused with
            `Overloaded`. Twice as many may wait in all: a flood fills its own half and leaves the others' free.
        max_wait_s: Longest wait for a slot that any call is admitted to; a quick backend's calls wait less.
        clock: Seconds, monotonic; the clock of the calls' deadlines.
    """

    def __init__(
        self,
        send: Send,
        *,
        max_group_windows: int = 32,
        max_in_flight: int,
        max_queued_windows: int,
        max_wait_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._max_group_windows = max_group_windows
        self.max_in_flight = max_in_flight
        self._clock = clock
        self._queue: FairQueue[Part] = FairQueue()
        self._flights: set[_Flight] = set()
        self._flying_windows = 0
        self._pace = Pace()
        self._admission = Admission(
            self._pace,
            max_group_windows=max_group_windows,
            max_queued_windows=max_queued_windows,
            max_wait_s=max_wait_s,
        )
        self._launch_is_due = False
        self._sent_groups = 0
        self._sent_windows = 0

    async def predict(self, call: Call) -> Answer:
        """Answer the call's windows in their order; the answer is checked.

        Raises:
            Overloaded: Too many windows wait already, or they take too long.
            DeadlineExceeded: The call's deadline passed; it is raised at the deadline and not later.
            ModelOutputInvalid: The answer for this call's windows is none that anybody may act on.
            ServingError: What `send` raised for a group with a part of this call.
        """
        caller = self._admit(call)
        expiry = asyncio.get_running_loop().call_later(call.deadline - self._clock(), caller.expire)
        try:
            return await caller.answer
        finally:
            expiry.cancel()
            self._leave(caller)

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._flights

    def stats(self) -> dict[str, float]:
        """Present queue and lifetime totals; windows per group is the ratio of the last two."""
        return {
            "queued_windows": self._queue.n_windows,
            "in_flight_groups": len(self._flights),
            "ms_per_window": round(1e3 * self._pace.s_per_window, 3),
            "expected_wait_ms": round(1e3 * self._pace.s_per_window * self._queue.n_windows, 3),
            "groups_total": self._sent_groups,
            "windows_total": self._sent_windows,
        }

    def close(self) -> None:
        """Fail every caller with `NotReady` and cancel what is under way."""
        flying = (part for flight in self._flights for part in flight.group.parts)
        for caller in {part._caller for part in (*self._queue, *flying)}:
            caller.fail(NotReady("the backend is stopping"))

    def _admit(self, call: Call) -> _Caller:
        now = self._clock()
        if call.deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was sent")
        self._admission.refuse_overload(
            len(call.windows),
            call.deadline - now,
            ahead=self._queue.ahead_of(call.principal),
            queued=self._queue.n_windows,
            flying=self._flying_windows,
            slots=self.max_in_flight,
            is_last_resort=call.is_fallback,
        )
        caller = _Caller(call, now, self._max_group_windows)
        for part in caller.parts:
            self._queue.put(part)
        self._launch_soon()
        return caller

    def _launch_soon(self) -> None:
        """Launch on the loop's next turn, so that all calls of this turn share a group."""
        if self._queue and not self._launch_is_due and len(self._flights) < self.max_in_flight:
            self._launch_is_due = True
            asyncio.get_running_loop().call_soon(self._launch)

    def _launch(self) -> None:
        self._launch_is_due = False
        while self._queue and len(self._flights) < self.max_in_flight:
            now = self._clock()
            parts = self._queue.take(self._admission.group_windows(self.max_in_flight))
            for part in parts:
                if part.call.deadline <= now:
                    part._caller.expire()
            if wanted := tuple(part for part in parts if not part._caller.answer.done()):
                self._fly(wanted, now)

    def _fly(self, parts: tuple[Part, ...], now: float) -> None:
        if not self._flights:
            self._pace.mark(now)
        flight = _Flight(Group.of(parts), now)
        self._flights.add(flight)
        self._flying_windows += flight.group.n_windows
        self._sent_groups += 1
        self._sent_windows += flight.group.n_windows
        flight.task = asyncio.create_task(self._answer(flight))
        flight.task.add_done_callback(lambda _: self._land(flight))  # runs even for a task cancelled before its start

    async def _answer(self, flight: _Flight) -> None:
        try:
            try:
                flight.deliver(flight.group.parts, await self._ask(flight.group), self._clock())
            except ModelFailed:
                if len(flight.group.parts) == 1:
                    raise
                await self._answer_singly(flight)
        except ServingError as error:
            flight.fail(flight.group.parts, error)
        except Exception:
            _log.exception("sending a group failed in an unforeseen way")
            flight.fail(flight.group.parts, ServingError("the backend failed"))
        except asyncio.CancelledError:
            # Finds nobody when they left first.
            flight.fail(flight.group.parts, Unavailable("the request was cancelled on its way"))
            raise

    async def _answer_singly(self, flight: _Flight) -> None:
        """After the model failed on a group: once more for each call that still waits, in the same slot."""
        flight.group.was_retried = True
        for part in flight.group.parts:
            if part._caller.answer.done():
                continue
            try:
                flight.deliver((part,), await self._ask(Group.of((part,), is_repeat=True)), self._clock())
            except ModelFailed as error:
                flight.fail((part,), error)

    async def _ask(self, group: Group) -> Prediction:
        prediction = await self._send(group)
        if len(prediction) != group.n_windows:
            raise ModelOutputInvalid("the model answered for another number of windows")
        return prediction

    def _land(self, flight: _Flight) -> None:
        self._flights.discard(flight)
        self._flying_windows -= flight.group.n_windows
        now = self._clock()
        # A failure says nothing: a backend that hangs must not look like one that is busy.
        if flight.is_answered and not flight.group.was_retried:
            self._pace.land(flight.group.n_windows, flight.sent, now, is_saturated=bool(self._queue))
        self._pace.mark(now)
        self._launch_soon()

    def _leave(self, caller: _Caller) -> None:
        """Take the caller's parts out of the queue, and out of groups that may then have nobody left."""
        for part in caller.parts:
            if part._flight is not None:
                part._flight.leave()
            else:
                self._queue.discard(part)


class _Caller:
    """One waiting call: its parts, and the answer put together from theirs."""

    __slots__ = ("_missing", "answer", "arrived", "parts")

    def __init__(self, call: Call, arrived: float, max_part_windows: int) -> None:
        starts = range(0, len(call.windows), max_part_windows)
        self.arrived = arrived
        self.parts = [Part(call, call.windows[start : start + max_part_windows], self) for start in starts]
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._missing = len(self.parts)

    def fail(self, error: ServingError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # counts as seen: a caller who is cancelled this very moment never looks

    def expire(self) -> None:
        kind = DeadlineExceeded if self._had_time() else ExpiredInQueue
        self.fail(kind("the deadline passed before there was an answer"))

    def _had_time(self) -> bool:
        """Whether a part was with the backend for a fair time, or at least for longer than it had waited here."""
        flying = (part for part in self.parts if part._flight is not None and part._prediction is None)
        sent = min((part._flight.sent for part in flying if part._flight is not None), default=math.inf)
        return self.parts[0].call.deadline - sent >= min(FAIR_BUDGET_S, sent - self.arrived)

    def deliver(self, part: Part, prediction: Prediction, group_windows: int, sent: float, now: float) -> None:
        part._prediction, part._group_windows = prediction, group_windows
        self._missing -= 1
        if self._missing or self.answer.done():
            return
        predictions = [p._prediction for p in self.parts if p._prediction is not None]
        if len({p.model_version for p in predictions}) > 1:
            self.fail(Unavailable("the model was replaced while the request was being answered"))
        else:
            # The part that came last is the one the caller waited for: its stages add up to the whole wait.
            groups = tuple((len(p.windows), p._group_windows) for p in self.parts)
            self.answer.set_result(Answer(Prediction.join(predictions), self._stages_ms(prediction, sent, now), groups))

    def _stages_ms(self, prediction: Prediction, sent: float, now: float) -> dict[str, float]:
        at_model_ms = prediction.batch_wait_ms + prediction.model_time_ms
        return {
            "queue": 1e3 * (sent - self.arrived),
            "transport": max(0.0, 1e3 * (now - sent) - at_model_ms),
            "batch": prediction.batch_wait_ms,
            "model": prediction.model_time_ms,
        }


class _Flight:
    """A group under way and the callers who still wait for it."""

    task: asyncio.Task[None]

    def __init__(self, group: Group, sent: float) -> None:
        self.group = group
        self.is_answered = False
        self.sent = sent
        self._waiting = len(group.parts)
        for part in group.parts:
            part._flight = self

    def leave(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self.task.cancel()  # no effect on one that has landed

    def deliver(self, parts: tuple[Part, ...], prediction: Prediction, now: float) -> None:
        """Give each part its rows. They are checked together; only if that fails, each part's by themselves."""
        self.is_answered = True
        all_sound = _is_sound(prediction)
        start = 0
        for part in parts:
            stop = start + len(part.windows)
            rows = prediction if len(parts) == 1 else prediction.rows(start, stop)
            if all_sound or (len(parts) > 1 and _is_sound(rows)):
                part._caller.deliver(part, rows, len(prediction), self.sent, now)
            else:
                part._caller.fail(ModelOutputInvalid("the model's answer is none that anybody may act on"))
            start = stop

    def fail(self, parts: tuple[Part, ...], error: ServingError) -> None:
        for part in parts:
            part._caller.fail(type(error)(error.detail))  # one each: a raised exception collects its raiser's frames


def _is_sound(prediction: Prediction) -> bool:
    try:
        prediction.check()
    except ModelOutputInvalid as error:
        _log.warning("the model's answer was withheld: %s", error)
        return False
    return True
