"""The load itself: who asks when, and what is written down of each request.

Closed loop: each of C callers asks again as soon as it is answered, so a slow service is asked less often. Open loop:
request i is due at i / rate whatever the service does, and its latency counts from then, the time it waited for a free
caller included. Both are one loop over C callers; they differ in when a request is due.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

OK = "ok"
UNSENT = "unsent"


class Outcome(NamedTuple):
    """How one request ended: `ok`, an HTTP status other than 200 or a code; and who answered, where that is told."""

    code: str
    served_by: str | None = None


class Target(Protocol):
    """What is asked."""

    name: str

    async def open(self) -> None:
        """Get ready. Raises `NoTarget` where nothing can be measured."""

    async def close(self) -> None: ...

    async def ask(self, number: int) -> Outcome:
        """Send the request of this number and wait for its answer, within the target's own time limit."""


class NoTarget(Exception):
    """There is nothing to measure; the message is one line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is asked, and when.

    Attributes:
        requests: At most so many; None for as many as the duration holds.
        duration_s: No request is due later than this after the start; None for no such limit.
        concurrency: Callers, each with one request at a time.
        rate_rps: Requests due per second, evenly; None for the closed loop.
        timeout_s: In the open loop, a request this late is not sent any more and has failed.
    """

    requests: int | None = 1000
    duration_s: float | None = None
    concurrency: int = 10
    rate_rps: float | None = None
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if self.requests is None and self.duration_s is None:
            raise ValueError("a load needs a number of requests or a duration")

    @property
    def expected(self) -> int | None:
        """How many requests there will be, where that is known before."""
        if self.rate_rps is None or self.duration_s is None:
            return self.requests
        due = math.ceil(self.rate_rps * self.duration_s)
        return due if self.requests is None else min(due, self.requests)


class Sample(NamedTuple):
    """One request.

    Attributes:
        due_s: When it was due, in seconds since the start.
        late_s: How much later it was sent; 0 in the closed loop.
        latency_s: From when it was due to the end of its answer.
        outcome: How it ended.
    """

    due_s: float
    late_s: float
    latency_s: float
    outcome: Outcome


async def apply_load(
    target: Target,
    plan: Plan,
    samples: list[Sample],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> float:
    """Send the planned requests and append a sample for each, in the order of their ends.

    Args:
        target: An open target.
        plan: How much and when.
        samples: Where samples go; it may be read meanwhile.
        clock: Seconds, monotonic.
        sleep: Waits for so many seconds.

    Returns:
        Seconds from the start to the last answer.
    """
    began = clock()
    numbers = iter(range(plan.requests)) if plan.requests is not None else itertools.count()

    async def call_again_and_again() -> None:
        for number in numbers:
            due = clock() if plan.rate_rps is None else began + number / plan.rate_rps
            if plan.duration_s is not None and due - began >= plan.duration_s:
                return
            if (wait_s := due - clock()) > 0:
                await sleep(wait_s)
            late_s = max(clock() - due, 0.0) if plan.rate_rps is not None else 0.0
            outcome = Outcome(UNSENT) if late_s > plan.timeout_s else await target.ask(number)
            samples.append(Sample(due - began, late_s, clock() - due, outcome))

    async with asyncio.TaskGroup() as callers:
        for _ in range(plan.concurrency):
            callers.create_task(call_again_and_again())
    return clock() - began


async def warm_up(target: Target, plan: Plan) -> None:
    """One request from each caller, not counted: it opens the connections and wakes what sleeps."""
    await asyncio.gather(*(target.ask(number) for number in range(plan.concurrency)))
