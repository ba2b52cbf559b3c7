"""The shadow: a share of live requests goes to the other arm too, unseen by whoever asked.

    answer sent ─► offer ─ chosen? ─► waiting (bounded) ─► one group at a time ─► other arm ─► compare ─► evidence

Nothing here makes a caller wait. An offer is taken once the answer has left; at most one group of shadow calls is
under way, so that a live call finds at most one in front of it; a group is gathered for a while, because a model takes
for many windows together a fraction of what it takes for each alone; and the shadow rests while the event loop is late,
the gateway is leaving, or the other arm keeps calls waiting. What it leaves out is counted, by reason: comparisons are
of the quieter moments.

To be called after the answer has been sent, for every answered request that chose neither version nor backend itself:

    shadow.offer(call, served, side)        # `side`: whose arm gave the answer

and, when a plan begins, changes or ends:

    shadow.configure(Setup(share, stable, canary, evidence))
    shadow.configure(None)

It spends nobody's quota.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from binascii import crc32
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from app.backends.base import Answer, Arm, Backend, Call
from app.rollout.compare import Comparison, Floats, compare
from app.rollout.dispatch import Served
from app.rollout.evidence import Evidence, Side
from serve_app.contract import ServingError

_LOGGER = logging.getLogger(__name__)

# What became of a request that was chosen. `compared` and `failed` were sent to the other arm.
Outcome = Literal[
    "compared", "failed", "other-version", "full", "fallback", "lag", "leaving", "killed", "not-ready", "busy", "stale"
]

MAX_WAITING_WINDOWS = 1024  # 12 MB of windows
GROUP_WINDOWS = 32  # as many as the coalescers send at once
# A group is sent once so much waits, or has waited so long.
GATHER_WINDOWS = 16
GATHER_S = 0.5
TIMEOUT_S = 2.0
MAX_LAG_S = 0.02
# A call that had to wait so long for its slot found the arm busy; the arm is then left alone for a while.
BUSY_QUEUE_MS = 2.0
BUSY_REST_S = 0.1

_OTHER: Mapping[Side, Side] = {"stable": "canary", "canary": "stable"}


class Books(Protocol):
    """Where the shadow counts what it does."""

    def count(self, outcome: Outcome) -> None:
        """One request that was chosen, and what became of it."""

    def observe_latency(self, side: Side, seconds: float) -> None:
        """How long the side's arm took for a request that both have answered."""

    def observe_distances(self, distances: Floats) -> None:
        """Total variation distances of the windows that both arms have answered, float64[B], 0..1."""

    def observe_gaps(self, gaps: Floats) -> None:
        """How far their expected returns are apart, float64[B], in combined standard deviations, 0 or more."""


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What is shadowed while a plan is in force.

    Attributes:
        share: Share of the answered requests, 0..1.
        stable, canary: The arms; each answers what the other has been asked.
        evidence: Where the comparisons are counted.
    """

    share: float
    stable: Arm
    canary: Arm
    evidence: Evidence

    def arm(self, side: Side) -> Arm:
        return self.stable if side == "stable" else self.canary


class _Offer(NamedTuple):
    """A request that one side has answered and the other is to answer too."""

    setup: Setup
    call: Call
    answer: Answer
    side: Side
    offered_at: float


class Shadow:
    """Asks the other arm, out of everybody's way.

    Args:
        backends: By name, and behind no breaker: what only the shadow meets must not take an arm from live callers.
        is_ready: Whether an answer is to be expected from this arm now, its breaker's word included.
        books: Counts.
        is_killed: Whether the kill switch stops this call.
        is_leaving: Whether the gateway is about to end.
        gather_s: How long a group that is not full is waited for.
        clock: Monotonic seconds, the clock of `Call.deadline`.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        *,
        is_ready: Callable[[Arm], bool],
        books: Books,
        is_killed: Callable[[Call], bool] = lambda call: False,
        is_leaving: Callable[[], bool] = lambda: False,
        gather_s: float = GATHER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backends = backends
        self._is_ready = is_ready
        self._books = books
        self._is_killed = is_killed
        self._is_leaving = is_leaving
        self._gather_s = gather_s
        self._clock = clock
        self._setup: Setup | None = None
        self._waiting: deque[_Offer] = deque()
        self._waiting_windows = 0
        self._is_gathered = asyncio.Event()
        self._busy_until: dict[str, float] = {}
        self._lag_s = 0.0
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Give up what waits and what is under way."""
        self._setup = None
        self._clear()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])

    def configure(self, setup: Setup | None) -> None:
        """Shadow by this from now on; None, or a share of 0, ends it. What waits for the old setup is forgotten."""
        self._setup = setup if setup is not None and setup.share > 0 else None
        self._clear()

    def observe_lag(self, seconds: float) -> None:
        """Take over how late the event loop is; to be told several times a second."""
        self._lag_s = seconds

    def offer(self, call: Call, served: Served, side: Side) -> None:
        """Take an answered request, if it is one of the share and there is room; returns at once and never raises.

        Args:
            call: As it was sent to the arm that answered.
            served: The answer that the caller has by now.
            side: Whose arm gave it.
        """
        setup = self._setup
        if setup is None or position(call.request_id) >= setup.share:
            return
        now = self._clock()
        self._note_queue(served.arm.backend, served.answer, now)
        if served.fallback is not None:
            self._books.count("fallback")  # the other arm has just failed this very call
        elif self._waiting_windows + len(call.windows) > MAX_WAITING_WINDOWS:
            self._books.count("full")
        else:
            self._waiting.append(_Offer(setup, call, served.answer, side, now))
            self._waiting_windows += len(call.windows)
            if self._waiting_windows >= GATHER_WINDOWS:
                self._is_gathered.set()
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work())

    def _clear(self) -> None:
        self._waiting.clear()
        self._waiting_windows = 0

    async def _work(self) -> None:
        """Send what waits, one group after the other, each group's first call alone: its latency is a call's own."""
        while self._waiting:
            await self._gather()
            sent = [offer for offer in self._take() if self._may_send(offer)]
            if not sent:
                await asyncio.sleep(0)  # live calls first, however much there is to drop
                continue
            await self._ask(sent[0], alone=True)
            await asyncio.gather(*(self._ask(offer) for offer in sent[1:]))

    async def _gather(self) -> None:
        """Wait until enough has come, or long enough."""
        if self._waiting_windows < GATHER_WINDOWS:
            self._is_gathered.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._gather_s):
                    await self._is_gathered.wait()

    def _take(self) -> list[_Offer]:
        """The next group: offers in their order, as many as fit, or one that is too large."""
        offers: list[_Offer] = []
        room = GROUP_WINDOWS
        while self._waiting and (not offers or len(self._waiting[0].call.windows) <= room):
            offers.append(self._pop())
            room -= len(offers[-1].call.windows)
        return offers

    def _pop(self) -> _Offer:
        offer = self._waiting.popleft()
        self._waiting_windows -= len(offer.call.windows)
        return offer

    def _may_send(self, offer: _Offer) -> bool:
        obstacle = self._obstacle(offer)
        if obstacle is not None:
            self._books.count(obstacle)
        return obstacle is None

    def _obstacle(self, offer: _Offer) -> Outcome | None:
        """Why the offer is left out now."""
        now = self._clock()
        arm = offer.setup.arm(_OTHER[offer.side])
        obstacles: tuple[tuple[Outcome, bool], ...] = (
            ("stale", now - offer.offered_at > TIMEOUT_S),
            ("leaving", self._is_leaving()),
            ("killed", self._is_killed(offer.call)),
            ("lag", self._lag_s > MAX_LAG_S),
            ("busy", now < self._busy_until.get(arm.backend, -math.inf)),
            ("not-ready", arm.backend not in self._backends or not self._is_ready(arm)),
        )
        return next((reason for reason, holds in obstacles if holds), None)

    async def _ask(self, offer: _Offer, *, alone: bool = False) -> None:
        """Have the other arm answer too, and count how far the two are apart; how long both took if it is `alone`."""
        arm = offer.setup.arm(_OTHER[offer.side])
        call = replace(
            offer.call, version=arm.version, deadline=self._clock() + TIMEOUT_S, principal="shadow", has_fallback=False
        )
        try:
            answer = await self._backends[arm.backend].predict(call)
        except ServingError:
            self._books.count("failed")
            return
        except Exception:
            _LOGGER.exception("an arm failed in an unforeseen way while it was shadowed")
            self._books.count("failed")
            return
        self._note_queue(arm.backend, answer, self._clock())
        if self._setup is not offer.setup:
            return  # what was compared belongs to a plan that has ended
        if arm.version not in (None, answer.prediction.model_version):
            self._books.count("other-version")
            return
        if alone:
            self._books.observe_latency(offer.side, _seconds(offer.answer))
            self._books.observe_latency(_OTHER[offer.side], _seconds(answer))
        self._note(offer, answer)

    def _note(self, offer: _Offer, answer: Answer) -> None:
        answers = {offer.side: offer.answer, _OTHER[offer.side]: answer}
        comparison = compare(answers["stable"].prediction, answers["canary"].prediction)
        self._books.count("compared")
        self._books.observe_distances(comparison.distance)
        if comparison.regression_gap is not None:
            self._books.observe_gaps(np.abs(comparison.regression_gap))
        add_to(offer.setup.evidence, comparison)

    def _note_queue(self, backend: str, answer: Answer, now: float) -> None:
        """An answer that waited for its slot says that others wait there too: a shadow call would be one more."""
        if answer.stages_ms.get("queue", 0.0) > BUSY_QUEUE_MS:
            self._busy_until[backend] = now + BUSY_REST_S


def _seconds(answer: Answer) -> float:
    """How long the arm took, all stages together."""
    return sum(answer.stages_ms.values()) / 1e3


def position(request_id: str) -> float:
    """The request's fixed point in [0, 1); ids are random, so any hash that spreads them will do."""
    return crc32(request_id.encode()) / (1 << 32)


def add_to(evidence: Evidence, comparison: Comparison) -> None:
    """Count every compared window."""
    beyond = comparison.outside_interval
    for stable, canary, outside in zip(
        comparison.stable_class.tolist(),
        comparison.canary_class.tolist(),
        [None] * len(comparison.distance) if beyond is None else beyond.tolist(),
        strict=True,
    ):
        evidence.count_shadow(stable, canary, outside_interval=outside)
