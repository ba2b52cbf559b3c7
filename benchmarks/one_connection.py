"""What gateway and Ray add to the bare engine, at one connection.

A round has two parts. First the engine alone in this process, one call after another on one thread: its best case,
with everything it needs in the caches. Then the engine and the gateway in turn, one call each: now the engine finds the
caches as any caller does between whose calls something else runs. The served window travels as a raw float32 body
through gateway, bridge and replica.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.request import HOST, Request
from serve_app.contract import FloatArray, Options
from serve_app.engine import Engine

ROUNDS = 5
CALLS = 150
ENGINES = ("engine_in_turn_ms", "engine_hot_ms")


def measure_added(
    request: Request, engine: Engine, windows: FloatArray, *, calls: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Each round's medians, and what is added over them.

    Args:
        request: Asks the running gateway for `windows`.
        engine: The same engine, warm, on one thread.
        windows: float32[1,F,T].
        calls: Of each kind in each round.
        say: Told of each round.
    """
    options = Options()
    with kept_connection(request.port) as connection:
        rounds = []
        for number in range(ROUNDS):
            rounds.append(one_round(lambda: engine.predict(windows, options), lambda: ask(connection, request), calls))
            say(f"    one connection, round {number + 1}: {rounds[-1]}")
    return summarise(rounds)


@contextlib.contextmanager
def kept_connection(port: int) -> Iterator[http.client.HTTPConnection]:
    """One kept connection of the standard library's client, whose own cost is small beside what is measured."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, request: Request) -> None:
    """Raises `ValueError` for an answer other than 200 from Ray Serve: a fallback is not what is measured."""
    connection.request(request.method, request.path, body=request.body, headers=dict(request.headers))
    response = connection.getresponse()
    response.read()
    if response.status != http.HTTPStatus.OK or response.headers["X-Served-By"] != "ray_serve":
        raise ValueError(f"not served by Ray Serve: {response.status} {dict(response.headers)}")


def one_round(engine: Callable[[], object], served: Callable[[], object], calls: int) -> dict[str, float]:
    """Medians in milliseconds of the engine hot, the engine in turn and the served window."""
    hot_ms = [timed_ms(engine) for _ in range(calls)]
    for _ in range(calls // 3):
        served()  # the processes that were idle meanwhile find their pace again
    in_turn = [(timed_ms(engine), timed_ms(served)) for _ in range(calls)]
    medians = {
        "engine_hot_ms": statistics.median(hot_ms),
        "engine_in_turn_ms": statistics.median(engine_ms for engine_ms, _ in in_turn),
        "served_ms": statistics.median(served_ms for _, served_ms in in_turn),
    }
    return {name: round(value, 3) for name, value in medians.items()}


def timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def summarise(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The rounds, and served less engine over them: `median`, `min`, `max` against both kinds of engine call."""
    summary: dict[str, Any] = {"rounds": rounds}
    for engine in ENGINES:
        added = [row["served_ms"] - row[engine] for row in rounds]
        figures = {"median": statistics.median(added), "min": min(added), "max": max(added)}
        summary[f"added_over_{engine}"] = {name: round(value, 3) for name, value in figures.items()}
    return summary
