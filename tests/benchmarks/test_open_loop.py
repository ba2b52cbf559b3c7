"""The open loop against a server that answers by a script: what it does wrong must show."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from benchmarks.open_loop import open_loop, poisson_arrivals
from benchmarks.request import Measured, Request

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
BODY = b"x" * 1000

Script = Callable[[int], bytes | None]  # answer to request n; None cuts the connection


class Server(threading.Thread):
    """Answers one connection after another, each request by `script`."""

    def __init__(self, script: Script) -> None:
        super().__init__(daemon=True)
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.asked = 0

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rb") as reader:
                    self._converse(connection, reader)

    def _converse(self, connection, reader) -> None:  # type: ignore[no-untyped-def]
        while reader.readline():
            while reader.readline() != b"\r\n":
                pass
            assert reader.read(len(BODY)) == BODY
            self.asked += 1
            answer = self._script(self.asked - 1)
            if answer is None:
                return
            connection.sendall(answer)
            if answer is LAST:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    servers: list[Server] = []

    def start(script: Script) -> Server:
        servers.append(Server(script))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.close()
        server.join(5)


def load(server: Server, due_s: list[float], drain_s: float = 5.0) -> Measured:
    request = Request(server.port, "POST", "/", {"X-A": "b"}, BODY)
    return open_loop(request, np.array(due_s), connections=1, drain_s=drain_s)


def every_ms(count: int) -> list[float]:
    return [number / 1000 for number in range(count)]


def test_a_stall_shows_in_the_latency_of_everything_that_was_due_meanwhile(serve: Callable[[Script], Server]) -> None:
    def stall(number: int) -> bytes:
        if number == 50:
            time.sleep(0.2)
        return OK

    measured = load(serve(stall), every_ms(200))
    assert (measured.answered, measured.failed) == (200, {})
    # Half of the requests fell due in the stall's first 100 ms and waited 100 ms or more for its end; a generator
    # that counts from the sending would see one slow request in two hundred.
    assert measured.latency_ms["p50"] > 50
    assert measured.latency_ms["max"] > 190


def test_without_a_stall_nothing_is_slow(serve: Callable[[Script], Server]) -> None:
    measured = load(serve(lambda _: OK), every_ms(200))
    assert measured.latency_ms["p50"] < 20
    assert measured.due_rps == pytest.approx(200 / 0.199)


def test_answers_other_than_200_are_counted_by_status_and_are_no_latency(serve: Callable[[Script], Server]) -> None:
    measured = load(serve(lambda number: BUSY if number % 4 == 0 else OK), every_ms(100))
    assert (measured.answered, measured.failed) == (75, {"503": 25})


def test_a_cut_connection_fails_its_request_and_is_replaced(serve: Callable[[Script], Server]) -> None:
    measured = load(serve(lambda number: None if number == 10 else OK), every_ms(50))
    assert (measured.answered, measured.failed) == (49, {"connection": 1})


def test_a_server_that_closes_after_an_answer_is_asked_over_a_new_connection(
    serve: Callable[[Script], Server],
) -> None:
    measured = load(serve(lambda number: LAST if number == 10 else OK), every_ms(50))
    assert (measured.answered, measured.failed) == (50, {})


def test_what_is_never_answered_is_counted(serve: Callable[[Script], Server]) -> None:
    measured = load(serve(lambda number: OK if number < 5 else b""), every_ms(20), drain_s=0.2)
    assert (measured.answered, measured.failed) == (5, {"unanswered": 15})


def test_arrivals_are_drawn_once_for_a_seed_and_hold_the_rate() -> None:
    times = poisson_arrivals(1000.0, 5.0, seed=1)
    assert len(times) == pytest.approx(5000, abs=300)
    assert times.max() < 5.0
    assert (np.diff(times) >= 0).all()
    assert np.diff(times).std() == pytest.approx(0.001, rel=0.1)  # exponential: as wide as its mean
    assert (times == poisson_arrivals(1000.0, 5.0, seed=1)).all()
    assert (times[:100] != poisson_arrivals(1000.0, 5.0, seed=2)[:100]).all()
