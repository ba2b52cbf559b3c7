"""An open-loop load in a process of its own, on one core: requests are due whatever became of the ones before.

Run as `python -m tests.integration.open_loop`, with the plan as JSON on standard input; it prints what came of each
request as JSON. A request that is due while every connection is busy opens another one, so none waits for a second.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import httptools
import numpy as np
import uvloop

from tests.integration.processes import ROOT

DRAIN_S = 3.0


class Plan(NamedTuple):
    """Attributes: rate_rps: Arrivals per second on average, a Poisson process; seed: Of the draw."""

    port: int
    path: str
    headers: dict[str, str]
    body_hex: str
    rate_rps: float
    seconds: float
    connections: int
    core: int
    seed: int = 0


class Result(NamedTuple):
    """One request; latencies in seconds count from when it was due.

    Attributes:
        due_s: Seconds since the start.
        latency_s: Until the end of its answer.
        late_s: Until it was sent: the generator's own fault.
        status: Of HTTP, 0 when the connection broke or nothing came.
        retry_after: The header, where there is one.
    """

    due_s: float
    latency_s: float
    late_s: float
    status: int
    retry_after: str | None

    @property
    def answer_s(self) -> float:
        """From when it was sent, the generator's own lateness left out."""
        return self.latency_s - self.late_s


class Load:
    """What came of one load."""

    def __init__(self, plan: Plan, results: list[Result]) -> None:
        self.plan = plan
        self.results = results

    @property
    def statuses(self) -> Counter[int]:
        return Counter(result.status for result in self.results)

    @property
    def answered(self) -> list[Result]:
        return [result for result in self.results if result.status == 200]

    def answered_ms(self, percent: float) -> float:
        """Percentile of the answers' latency, from when they were due."""
        return percentile_ms((result.latency_s for result in self.answered), percent)

    def refused_ms(self, percent: float) -> float:
        """Percentile of how quickly refusals came, from when the requests were sent."""
        return percentile_ms((result.answer_s for result in self.refused), percent)

    @property
    def refused(self) -> list[Result]:
        return [result for result in self.results if result.status == 503]

    @property
    def goodput_rps(self) -> float:
        """Answers per second, over the time in which requests were due or answers still came."""
        last = max((result.due_s + result.latency_s for result in self.answered), default=0.0)
        return len(self.answered) / max(self.plan.seconds, last)


def percentile_ms(seconds: Iterable[float], percent: float) -> float:
    values = list(seconds)
    return 1e3 * float(np.percentile(values, percent)) if values else float("nan")


def offer(plan: Plan) -> Load:
    """Offer the load from another process."""
    command = [sys.executable, "-m", "tests.integration.open_loop"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    limit_s = plan.seconds + DRAIN_S + 30
    ended = subprocess.run(
        command, input=json.dumps(plan), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit_s
    )
    assert ended.returncode == 0, ended.stderr
    return Load(plan, [Result(*row) for row in json.loads(ended.stdout)])


class Answer(NamedTuple):
    status: int
    retry_after: str | None
    ended: float


NOTHING = Answer(0, None, float("inf"))


class Connection(asyncio.Protocol):
    """Carries one request at a time, and is kept."""

    def __init__(self, idle: list[Connection]) -> None:
        self._idle = idle
        self._answer: asyncio.Future[Answer] | None = None
        self._retry_after: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self._retry_after = None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value.decode()

    def on_message_complete(self) -> None:
        if self._parser.should_keep_alive():
            self._idle.append(self)
        self._end(Answer(self._parser.get_status_code(), self._retry_after, time.monotonic()))

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        self._end(NOTHING)

    def _end(self, answer: Answer) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)


class Generator:
    """Sends the requests of a plan, each when it is due."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        body = bytes.fromhex(plan.body_hex)
        self._request = _head(plan.path, {**plan.headers, "Content-Length": str(len(body))}) + body
        self._idle: list[Connection] = []
        self._results: list[Result] = []

    async def run(self) -> list[Result]:
        self._idle += await asyncio.gather(*(self._connect() for _ in range(self._plan.connections)))
        gc.disable()
        asking = []
        began = time.monotonic()
        for due_s in _arrivals(self._plan):
            while (wait_s := began + due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            asking.append(asyncio.create_task(self._ask(began, due_s)))
        _, late = await asyncio.wait(asking, timeout=DRAIN_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return self._results

    async def _ask(self, began: float, due_s: float) -> None:
        answer, due, sent = NOTHING, began + due_s, time.monotonic()
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            sent = time.monotonic()
            answer = await connection.ask(self._request)
        except OSError:
            pass
        finally:
            latency_s = min(answer.ended, time.monotonic()) - due
            self._results.append(Result(due_s, latency_s, sent - due, answer.status, answer.retry_after))

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self._idle), "127.0.0.1", self._plan.port)
        return connection


def _arrivals(plan: Plan) -> list[float]:
    expected = plan.rate_rps * plan.seconds
    gaps = np.random.default_rng(plan.seed).exponential(1 / plan.rate_rps, int(2 * expected + 20))
    times = np.cumsum(gaps)
    return [float(time_s) for time_s in times[times < plan.seconds]]


def _head(path: str, headers: Mapping[str, str]) -> bytes:
    fields = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "gateway", **headers}.items())
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode()


def main() -> None:
    plan = Plan(*json.load(sys.stdin))
    os.sched_setaffinity(0, {plan.core})
    json.dump(uvloop.run(Generator(plan).run()), sys.stdout)


if __name__ == "__main__":
    main()
