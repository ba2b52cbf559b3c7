"""An open-loop load in a process of its own: requests are due whatever became of the ones before, and each is booked.

Run as `python -m tests.integration.open_loop FILE` with the plan as one line of JSON on standard input. It says when it
began, sends until the plan ends or standard input does, and writes what came of every request into the file. A request
that is due while every connection is busy opens another one, so none waits for a second. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import re
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import httptools
import numpy as np
import orjson
import uvloop

from tests.integration.processes import ROOT

PATIENCE_S = 3.0
STOP_CHECK_S = 0.1


class Stream(NamedTuple):
    """Requests of one kind and one tenant.

    Attributes:
        name: What its results are booked under.
        rate_rps: Arrivals per second on average.
        connections: Kept alive and used in turn.
        fresh_share: Share of the requests that open a connection for themselves, 0..1.
        even: Evenly spaced instead of a Poisson process.
        host: What the server is called in requests and, where there is TLS, in its certificate.
        ca_file: The certificate to believe, PEM; none for a server without TLS.
    """

    name: str
    port: int
    path: str
    headers: dict[str, str]
    rate_rps: float
    body_hex: str = ""
    method: str = "POST"
    connections: int = 8
    fresh_share: float = 0.0
    even: bool = False
    host: str = "127.0.0.1"
    ca_file: str = ""


class Plan(NamedTuple):
    """Attributes: seconds: How long at most; core: The only one to run on, or None; seed: Of every draw."""

    streams: list[Stream]
    seconds: float
    core: int | None = None
    seed: int = 0
    patience_s: float = PATIENCE_S


class Result(NamedTuple):
    """One request; times are seconds on the host's monotonic clock.

    Attributes:
        connection: `kept` or `fresh`.
        due: When it should have been sent.
        status: Of HTTP, 0 where no whole answer came.
        error: Why none came: `refused`, `closed`, `torn` or `silent`; empty otherwise.
        version: Of the model, as the answer names it.
        problem: The code of a refusal, as it names it.
        headers: Those of `KEPT_HEADERS` that came, in lower case.
    """

    serial: int
    stream: str
    connection: str
    due: float
    sent: float
    ended: float
    status: int
    error: str
    version: str
    problem: str
    headers: dict[str, str]

    @property
    def latency_s(self) -> float:
        """From when it was due."""
        return self.ended - self.due

    @property
    def late_s(self) -> float:
        """The generator's own fault."""
        return self.sent - self.due

    @property
    def answer_s(self) -> float:
        """From when it was sent, the generator's own lateness left out."""
        return self.ended - self.sent

    @property
    def retry_after(self) -> str | None:
        return self.headers.get("retry-after")

    @property
    def arm(self) -> str:
        return self.headers.get("x-served-by", "")


KEPT_HEADERS = frozenset(
    ("retry-after", "x-request-id", "x-served-by", "x-fallback", "x-ratelimit-mode", "ratelimit", "connection")
)


class Load:
    """What came of one load."""

    def __init__(self, results: list[Result], began: float, seconds: float) -> None:
        self.results = results
        self.began = began
        self.seconds = seconds

    def of(self, *streams: str) -> Load:
        """The part of some streams."""
        return Load([result for result in self.results if result.stream in streams], self.began, self.seconds)

    def between(self, start: float, end: float) -> Load:
        """What was due from `start` until before `end`."""
        results = [result for result in self.results if start <= result.due < end]
        return Load(results, start, end - start)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(result.status for result in self.results)

    @property
    def answered(self) -> list[Result]:
        return [result for result in self.results if result.status == 200]

    @property
    def refused(self) -> list[Result]:
        return [result for result in self.results if result.status == 503]

    def answered_ms(self, percent: float) -> float:
        """Percentile of the answers' latency, from when they were due."""
        return percentile_ms((result.latency_s for result in self.answered), percent)

    def refused_ms(self, percent: float) -> float:
        """Percentile of how quickly refusals came, from when the requests were sent."""
        return percentile_ms((result.answer_s for result in self.refused), percent)

    @property
    def goodput_rps(self) -> float:
        """Answers per second, over the time in which requests were due or answers still came."""
        last = max((result.ended - self.began for result in self.answered), default=0.0)
        return len(self.answered) / max(self.seconds, last)


def percentile_ms(seconds: Iterable[float], percent: float) -> float:
    values = list(seconds)
    return 1e3 * float(np.percentile(values, percent)) if values else float("nan")


class Offer:
    """A load that is being offered, from another process; `began` is when."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "results.json"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.open_loop", str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()
        first_line = self._process.stdout.readline()
        assert first_line, self._process.communicate()[1]
        self.began = float(first_line)

    def finish(self, *, now: bool = False) -> Load:
        """Wait for the plan's end, or end it `now`; then for the last answers."""
        until_end_s = 0.0 if now else max(0.0, self.began + self._plan.seconds - time.monotonic())
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has answers to wait for
            self._process.wait(until_end_s)
        ended_at = min(time.monotonic(), self.began + self._plan.seconds)
        _, errors = self._process.communicate(timeout=self._plan.patience_s + 30)  # closes its standard input
        assert self._process.returncode == 0, errors
        with self._folder:
            results = [Result(*row) for row in json.loads(self._file.read_bytes())]
        return Load(sorted(results, key=lambda result: result.due), self.began, ended_at - self.began)


def offer(plan: Plan) -> Load:
    """Offer the whole load."""
    return Offer(plan).finish()


class Answer(NamedTuple):
    status: int
    error: str
    ended: float
    headers: dict[str, str]
    body: bytes


def nothing(error: str) -> Answer:
    return Answer(0, error, time.monotonic(), {}, b"")


class Connection(asyncio.Protocol):
    """Carries one request at a time, and is kept for the next one where both sides want it."""

    def __init__(self, idle: deque[Connection] | None) -> None:
        self._idle = idle
        self._answer: asyncio.Future[Answer] | None = None
        self._begin()

    def _begin(self) -> None:
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._started = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self._begin()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def hang_up(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end(nothing("torn"))
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower().decode("latin-1")
        if lower in KEPT_HEADERS:
            self._headers[lower] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        ended = time.monotonic()
        if self._idle is not None and self._parser.should_keep_alive():
            self._idle.append(self)
        else:
            self._transport.close()
        self._end(Answer(self._parser.get_status_code(), "", ended, self._headers, b"".join(self._body)))

    def connection_lost(self, error: Exception | None) -> None:
        if self._idle is not None and self in self._idle:
            self._idle.remove(self)
        self._end(nothing("torn" if self._started else "closed"))

    def _end(self, answer: Answer) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)


class Generator:
    """Sends the requests of a plan, each when it is due."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._idle: dict[str, deque[Connection]] = {stream.name: deque() for stream in plan.streams}
        self._requests = {stream.name: request_bytes(stream, close=False) for stream in plan.streams}
        self._fresh_requests = {stream.name: request_bytes(stream, close=True) for stream in plan.streams}
        self._contexts = {
            stream.name: ssl.create_default_context(cafile=stream.ca_file) if stream.ca_file else None
            for stream in plan.streams
        }
        self._results: list[Result] = []
        self.stopped = False

    async def run(self) -> list[Result]:
        await asyncio.gather(*(self._warm(stream) for stream in self._plan.streams))
        gc.disable()
        asking = []
        began = time.monotonic()
        print(began, flush=True)
        for serial, (due_s, stream, fresh) in enumerate(_arrivals(self._plan)):
            await self._wait_until(began + due_s)
            if self.stopped:
                break
            asking.append(asyncio.create_task(self._ask(serial, stream, began + due_s, fresh=fresh)))
        await asyncio.gather(*asking)
        return self._results

    async def _wait_until(self, due: float) -> None:
        while (wait_s := due - time.monotonic()) > 0 and not self.stopped:
            await asyncio.sleep(min(wait_s, STOP_CHECK_S))

    async def _warm(self, stream: Stream) -> None:
        for _ in range(stream.connections):
            try:
                self._idle[stream.name].append(await self._connect(stream, self._idle[stream.name]))
            except OSError:
                return  # nobody is there yet, which the requests will find out

    async def _ask(self, serial: int, stream: Stream, due: float, *, fresh: bool) -> None:
        answer, connection = nothing("silent"), None
        sent = time.monotonic()
        idle = self._idle[stream.name]
        try:
            async with asyncio.timeout(self._plan.patience_s):
                if fresh or not idle:
                    connection = await self._connect(stream, None if fresh else idle)
                else:
                    connection = idle.popleft()
                sent = time.monotonic()
                answer = await connection.ask((self._fresh_requests if fresh else self._requests)[stream.name])
        except OSError:  # of which a timeout is one too
            answer = nothing("refused" if connection is None else "silent")
            if connection is not None:
                connection.hang_up()
        kind = "fresh" if fresh else "kept"
        document = _document(answer.body)
        version, problem = str(document.get("model_version", "")), re.split("[:#]", str(document.get("type", "")))[-1]
        self._results.append(
            Result(serial, stream.name, kind, due, sent, answer.ended, answer.status, answer.error, version, problem,
                   answer.headers)
        )  # fmt: skip

    async def _connect(self, stream: Stream, idle: deque[Connection] | None) -> Connection:
        loop = asyncio.get_running_loop()
        context = self._contexts[stream.name]
        _, connection = await loop.create_connection(
            lambda: Connection(idle),
            *("127.0.0.1", stream.port),
            ssl=context,
            server_hostname=stream.host if context else None,
        )
        return connection


def _document(body: bytes) -> dict[str, Any]:
    """What the body says; nothing where it is none of ours."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _arrivals(plan: Plan) -> list[tuple[float, Stream, bool]]:
    dice = random.Random(plan.seed)
    due = [
        (float(due_s), stream, dice.random() < stream.fresh_share)
        for number, stream in enumerate(plan.streams)
        for due_s in _times(stream, plan.seconds, plan.seed + number)
    ]
    return sorted(due, key=lambda each: each[0])


def _times(stream: Stream, seconds: float, seed: int) -> Any:
    if stream.even:
        return np.arange(0, seconds, 1 / stream.rate_rps)
    expected = stream.rate_rps * seconds
    gaps = np.random.default_rng(seed).exponential(1 / stream.rate_rps, int(2 * expected + 20))
    times = np.cumsum(gaps)
    return times[times < seconds]


def request_bytes(stream: Stream, *, close: bool) -> bytes:
    body = bytes.fromhex(stream.body_hex)
    headers = {"Host": stream.host, **stream.headers, "Content-Length": str(len(body))}
    if close:
        headers["Connection"] = "close"
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{stream.method} {stream.path} HTTP/1.1\r\n{fields}\r\n".encode() + body


async def _generate(plan: Plan) -> list[Result]:
    generator = Generator(plan)

    async def stop_when_told() -> None:
        await asyncio.to_thread(sys.stdin.read)  # until whoever started us closes it
        generator.stopped = True

    told = asyncio.create_task(stop_when_told())
    results = await generator.run()
    told.cancel()
    return results


def main() -> None:
    row = json.loads(sys.stdin.readline())
    plan = Plan([Stream(*stream) for stream in row[0]], *row[1:])
    if plan.core is not None:
        os.sched_setaffinity(0, {plan.core})
    results = uvloop.run(_generate(plan))
    Path(sys.argv[1]).write_text(json.dumps(results))
    os._exit(0)  # a thread may still read standard input


if __name__ == "__main__":
    main()
