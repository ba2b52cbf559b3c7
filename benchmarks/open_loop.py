"""The open loop: requests are due at times drawn beforehand, and their latency counts from then.

A server that stalls is asked no less: what became due meanwhile waits here, and its wait is part of its latency, so a
stall cannot hide (no coordinated omission). `app.bench.load` keeps the same rule with evenly spaced requests and the
event loop's timers, which round to milliseconds: good for a gateway far away, and up to half a millisecond early or
late. Here answers take that long, so requests leave by the kernel's timer.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import cast

import httptools
import numpy as np
import numpy.typing as npt
import uvloop

from app.bench.report import describe_ms
from benchmarks.alarm import Alarm
from benchmarks.request import HOST, Measured, Request

CONNECTION = "connection"
UNANSWERED = "unanswered"
_OK = 200
_CONNECT_TIMEOUT_S = 5.0


def poisson_arrivals(rate_rps: float, seconds: float, seed: int) -> npt.NDArray[np.float64]:
    """Times float64[N], ascending in [0, seconds), of a Poisson process.

    Args:
        rate_rps: Arrivals per second on average, above 0.
        seconds: How long.
        seed: Of the draw; the same for every system, so that all face the same bursts at the same rate.
    """
    expected = rate_rps * seconds
    gaps = np.random.default_rng(seed).exponential(1 / rate_rps, int(expected + 10 * expected**0.5 + 20))
    times = np.cumsum(gaps)
    return times[times < seconds]


def open_loop(request: Request, due_s: npt.NDArray[np.float64], *, connections: int, drain_s: float = 5.0) -> Measured:
    """Send a request at each of the given times.

    Args:
        request: What is sent.
        due_s: float64[N], ascending, seconds from the start; at least one.
        connections: How many, kept alive, each with one request at a time. What is due while none is free waits.
        drain_s: After the last due time, how long answers are waited for.

    Returns:
        What came of all N requests.

    Raises:
        OSError: The server does not take the connections.
    """
    cpu_s = time.process_time()
    load = uvloop.run(_run(request, due_s, connections, drain_s))
    return load.measured(time.process_time() - cpu_s)


async def _run(request: Request, due_s: npt.NDArray[np.float64], connections: int, drain_s: float) -> _Load:
    load = _Load(request.encode(), due_s)
    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
        await asyncio.gather(*(load.connect(request.port) for _ in range(connections)))
    gc.collect()
    gc.disable()
    try:
        load.start()
        async with asyncio.timeout(float(due_s[-1]) + drain_s):
            await load.ended
    except TimeoutError:
        pass  # what has no answer yet is counted as unanswered
    finally:
        gc.enable()
        load.close()
    return load


class _Load:
    """The requests of one run: which are due, which wait for a connection, what came of them."""

    def __init__(self, request: bytes, due_s: npt.NDArray[np.float64], clock: Callable[[], float] = time.perf_counter):
        self._request = request
        self._due_s = due_s
        self._due: list[float] = due_s.tolist()
        self._clock = clock
        self._next = 0
        self._left = len(self._due)
        self._waiting: deque[int] = deque()
        self._idle: list[_Caller] = []
        self._callers: set[_Caller] = set()
        self._reconnecting: set[asyncio.Task[None]] = set()
        self._latencies_s: list[float] = []
        self._late_s: list[float] = []
        self._failed: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        self._alarm = Alarm(loop, self._send_due)
        self.ended: asyncio.Future[None] = loop.create_future()

    async def connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: _Caller(self, port), HOST, port)

    def start(self) -> None:
        self._began = self._clock()
        self._send_due()

    def close(self) -> None:
        self._alarm.close()
        self.ended.cancel()
        for task in self._reconnecting:
            task.cancel()
        for caller in self._callers.copy():
            caller.close()

    def joined(self, caller: _Caller) -> None:
        self._callers.add(caller)
        self._take_next(caller)

    def answered(self, caller: _Caller, number: int, status: int) -> None:
        if status == _OK:
            self._latencies_s.append(self._clock() - self._began - self._due[number])
        else:
            self._failed[str(status)] += 1
        self._finish_one()
        if caller.is_open:
            self._take_next(caller)

    def lost(self, caller: _Caller, number: int | None) -> None:
        """A connection is gone, and with it the request on it; another one takes its place."""
        if self.ended.done():
            return
        self._callers.discard(caller)
        if caller in self._idle:
            self._idle.remove(caller)
        if number is not None:
            self._failed[CONNECTION] += 1
            self._finish_one()
        task = asyncio.create_task(self._reconnect(caller.port))
        self._reconnecting.add(task)
        task.add_done_callback(self._reconnecting.discard)

    def measured(self, cpu_s: float) -> Measured:
        seconds = float(self._due_s[-1]) or self._clock() - self._began
        failed = Counter(self._failed)
        if self._left:
            failed[UNANSWERED] = self._left
        return Measured(
            loop="open",
            seconds=seconds,
            answered=len(self._latencies_s),
            failed=dict(failed),
            latency_ms=describe_ms(self._latencies_s),
            due_rps=len(self._due) / seconds,
            late_ms=describe_ms(self._late_s),
            generator_cpu_s=cpu_s,
        )

    def _send_due(self) -> None:
        now = self._clock() - self._began
        while self._next < len(self._due) and self._due[self._next] <= now:
            if self._idle:
                self._late_s.append(now - self._due[self._next])
                self._idle.pop().send(self._request, self._next)
            else:
                self._waiting.append(self._next)
            self._next += 1
        if self._next < len(self._due):
            self._alarm.set(self._began + self._due[self._next])

    def _take_next(self, caller: _Caller) -> None:
        if self._waiting:
            caller.send(self._request, self._waiting.popleft())
        else:
            self._idle.append(caller)

    def _finish_one(self) -> None:
        self._left -= 1
        if self._left == 0 and not self.ended.done():
            self.ended.set_result(None)

    async def _reconnect(self, port: int) -> None:
        while not self.ended.done():
            try:
                await self.connect(port)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                return


class _Caller(asyncio.Protocol):
    """One HTTP/1.1 connection that carries one request at a time."""

    def __init__(self, load: _Load, port: int) -> None:
        self.port = port
        self._load = load
        self._number: int | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only
        self._parser = httptools.HttpResponseParser(self)
        self._load.joined(self)

    def send(self, request: bytes, number: int) -> None:
        self._number = number
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_message_complete(self) -> None:
        if self._number is None:  # an answer that nobody asked for
            self.close()
            return
        number, self._number = self._number, None
        if not self._parser.should_keep_alive():
            self.close()
        self._load.answered(self, number, self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        number, self._number = self._number, None
        self._load.lost(self, number)

    def close(self) -> None:
        self.is_open = False
        self._transport.close()
