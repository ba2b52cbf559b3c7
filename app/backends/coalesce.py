"""Many callers, few sends: calls that wait while the backend is busy leave together, as one group of windows.

The rule has no timer. While fewer than `max_in_flight` groups are under way, a call leaves on the next turn of the
event loop, together with whatever arrived in the same turn. While all are under way, calls gather, and leave when one
comes back: the busier the backend, the fuller the groups, and nobody waits for company.

    predict ── parts ──► lane per (version, options) ── group ──► send ──► rows back to each caller
               split at                take: oldest first, up to
               max_group_windows       max_group_windows
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from app.backends.base import Answer, Call
from serve_app.contract import (
    DeadlineExceeded,
    FloatArray,
    ModelOutputInvalid,
    NotReady,
    Options,
    Overloaded,
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
    _flight: _Flight | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Group:
    """What is sent at once: parts of calls that want the same thing from the same model version.

    Attributes:
        deadline: Seconds on the monotonic clock: the latest of the callers'; past it nobody waits for any row.
    """

    version: str | None
    options: Options
    deadline: float
    parts: tuple[Part, ...]

    @property
    def n_windows(self) -> int:
        return sum(len(part.windows) for part in self.parts)


Send = Callable[[Group], Awaitable[Prediction]]
_Lane = OrderedDict[Part, None]  # a queue that also gives up any member at once


class Coalescer:
    """Gathers calls for one destination into groups and gives every caller its own rows.

    A failing group fails the callers in it and nobody else. A caller who is cancelled, or whose deadline passes,
    leaves at once; when the last caller of a group under way has left, its `send` is cancelled.

    Args:
        send: Answers one group; given the windows of its parts in order, it returns one row for each.
        max_group_windows: Most windows in one group; larger calls are split and put together again.
        max_in_flight: Most groups under way at a time; the attribute may be changed at any time.
        max_queued_windows: Most windows waiting for a slot; beyond them calls are refused with `Overloaded`.
        clock: Seconds, monotonic; the clock of the calls' deadlines.
    """

    def __init__(
        self,
        send: Send,
        *,
        max_group_windows: int = 32,
        max_in_flight: int,
        max_queued_windows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_queued_windows < max_group_windows:
            raise ValueError("max_queued_windows must hold at least one group")
        self._send = send
        self._max_group_windows = max_group_windows
        self.max_in_flight = max_in_flight
        self._max_queued_windows = max_queued_windows
        self._clock = clock
        self._lanes: dict[tuple[str | None, Options], _Lane] = {}
        self._flights: set[_Flight] = set()
        self._queued_windows = 0
        self._launch_is_due = False
        self._sent_groups = 0
        self._sent_windows = 0

    async def predict(self, call: Call) -> Answer:
        """Answer the call's windows in their order.

        Raises:
            Overloaded: Too many windows wait already.
            DeadlineExceeded: The call's deadline passed; it is raised at the deadline and not later.
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
        return not self._lanes and not self._flights

    def stats(self) -> dict[str, int]:
        """Present queue and lifetime totals; windows per group is the ratio of the last two."""
        return {
            "queued_windows": self._queued_windows,
            "in_flight_groups": len(self._flights),
            "groups_total": self._sent_groups,
            "windows_total": self._sent_windows,
        }

    def close(self) -> None:
        """Fail every caller with `NotReady` and cancel what is under way."""
        waiting = {part._caller for lane in self._lanes.values() for part in lane}
        flying = {part._caller for flight in self._flights for part in flight.group.parts}
        for caller in waiting | flying:
            caller.fail(NotReady("the backend is stopping"))

    def _admit(self, call: Call) -> _Caller:
        now = self._clock()
        if call.deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was sent")
        if self._queued_windows + len(call.windows) > self._max_queued_windows:
            raise Overloaded("too many windows are waiting")
        caller = _Caller(call, now, self._max_group_windows)
        lane = self._lanes.setdefault((call.version, call.options), OrderedDict())
        lane.update(dict.fromkeys(caller.parts))
        self._queued_windows += len(call.windows)
        self._launch_soon()
        return caller

    def _launch_soon(self) -> None:
        """Launch on the loop's next turn, so that all calls of this turn share a group."""
        if self._lanes and not self._launch_is_due and len(self._flights) < self.max_in_flight:
            self._launch_is_due = True
            asyncio.get_running_loop().call_soon(self._launch)

    def _launch(self) -> None:
        self._launch_is_due = False
        while self._lanes and len(self._flights) < self.max_in_flight:
            parts = self._take()
            if parts:
                self._fly(parts)

    def _take(self) -> list[Part]:
        """Take the next group's parts from the queue: the lane whose head has waited longest, its oldest first.

        This is the one place that decides who goes next: fairness between principals belongs here.
        """
        lane = min(self._lanes.values(), key=lambda lane: next(iter(lane))._caller.arrived)
        now = self._clock()
        parts: list[Part] = []
        room = self._max_group_windows
        while lane and len((part := next(iter(lane))).windows) <= room:
            self._dequeue(part)
            if part.call.deadline <= now:
                part._caller.expire()
            else:
                parts.append(part)
                room -= len(part.windows)
        return parts

    def _dequeue(self, part: Part) -> None:
        key = (part.call.version, part.call.options)
        lane = self._lanes[key]
        del lane[part]
        if not lane:
            del self._lanes[key]
        self._queued_windows -= len(part.windows)

    def _fly(self, parts: list[Part]) -> None:
        first = parts[0].call
        deadline = max(part.call.deadline for part in parts)
        flight = _Flight(Group(first.version, first.options, deadline, tuple(parts)), self._clock())
        self._flights.add(flight)
        self._sent_groups += 1
        self._sent_windows += flight.group.n_windows
        flight.task = asyncio.create_task(self._answer(flight))
        flight.task.add_done_callback(lambda _: self._land(flight))  # runs even for a task cancelled before its start

    async def _answer(self, flight: _Flight) -> None:
        try:
            prediction = await self._send(flight.group)
            if len(prediction) != flight.group.n_windows:
                raise ModelOutputInvalid("the model answered for another number of windows")
        except ServingError as error:
            flight.fail(error)
        except Exception:
            _log.exception("sending a group failed in an unforeseen way")
            flight.fail(ServingError("the backend failed"))
        except asyncio.CancelledError:
            flight.fail(Unavailable("the request was cancelled on its way"))  # finds nobody when they left first
            raise
        else:
            flight.deliver(prediction, self._clock())

    def _land(self, flight: _Flight) -> None:
        self._flights.discard(flight)
        self._launch_soon()

    def _leave(self, caller: _Caller) -> None:
        """Take the caller's parts out of the queue, and out of groups that may then have nobody left."""
        for part in caller.parts:
            if part._flight is not None:
                part._flight.leave()
            elif part in self._lanes.get((part.call.version, part.call.options), ()):
                self._dequeue(part)


class _Caller:
    """One waiting call: its parts, and the answer put together from theirs."""

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
        self.fail(DeadlineExceeded("the deadline passed before there was an answer"))

    def deliver(self, part: Part, prediction: Prediction, sent: float, now: float) -> None:
        part._prediction = prediction
        self._missing -= 1
        if self._missing or self.answer.done():
            return
        predictions = [p._prediction for p in self.parts if p._prediction is not None]
        if len({p.model_version for p in predictions}) > 1:
            self.fail(Unavailable("the model was replaced while the request was being answered"))
        else:
            # The part that came last is the one the caller waited for: its stages add up to the whole wait.
            self.answer.set_result(Answer(Prediction.join(predictions), self._stages_ms(prediction, sent, now)))

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
        self._sent = sent
        self._waiting = len(group.parts)
        for part in group.parts:
            part._flight = self

    def leave(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self.task.cancel()  # no effect on one that has landed

    def deliver(self, prediction: Prediction, now: float) -> None:
        start = 0
        for part in self.group.parts:
            stop = start + len(part.windows)
            rows = prediction if stop - start == len(prediction) else prediction.rows(start, stop)
            part._caller.deliver(part, rows, self._sent, now)
            start = stop

    def fail(self, error: ServingError) -> None:
        for part in self.group.parts:
            part._caller.fail(type(error)(error.detail))  # one each: a raised exception collects its raiser's frames
