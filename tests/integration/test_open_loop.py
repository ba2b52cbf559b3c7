"""The load books what came of each request, also of those to which nothing came."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.integration.open_loop import Load, Offer, Plan, Stream, offer

ANSWER = b"HTTP/1.1 200 OK\r\nX-Served-By: legacy\r\nContent-Length: 21\r\n\r\n" + b'{"model_version":"7"}'


@contextmanager
def server(behave: Callable[[socket.socket, int], bool]) -> Iterator[int]:
    """Calls `behave` for each request with its number on its connection, until that says that it is over."""

    def serve(line: socket.socket) -> None:
        with line:
            number = 0
            while line.recv(65536):
                if not behave(line, number):
                    return
                number += 1

    def accept() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(line,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def ask(port: int, *, seconds: float = 0.5, fresh_share: float = 0.0, patience_s: float = 3.0) -> Load:
    stream = Stream("desk", port, "/", {}, 40, body_hex="00", connections=2, fresh_share=fresh_share, even=True)
    return offer(Plan([stream], seconds, patience_s=patience_s))


def answer(line: socket.socket, _number: int) -> bool:
    line.sendall(ANSWER)
    return True


def test_every_request_is_booked_with_what_its_answer_said() -> None:
    with server(answer) as port:
        load = ask(port, fresh_share=0.5)
    assert len(load.results) == 20
    assert {(row.status, row.error, row.arm, row.version) for row in load.results} == {(200, "", "legacy", "7")}
    assert {row.connection for row in load.results} == {"kept", "fresh"}
    assert [row.serial for row in load.results] == list(range(20))


def test_half_an_answer_is_torn() -> None:
    def tear(line: socket.socket, _number: int) -> bool:
        line.sendall(ANSWER[:-5])
        return False

    with server(tear) as port:
        assert {(row.status, row.error) for row in ask(port).results} == {(0, "torn")}


def test_a_connection_that_ends_without_an_answer_is_booked_and_not_asked_twice() -> None:
    with server(lambda line, number: number == 0 and answer(line, number)) as port:
        load = ask(port)
    assert {row.error for row in load.results if row.status == 0} == {"closed"}
    assert len(load.results) == 20


def test_silence_is_booked_when_patience_ends() -> None:
    with server(lambda _line, _number: True) as port:
        load = ask(port, seconds=0.2, patience_s=0.4)
    assert {(row.status, row.error) for row in load.results} == {(0, "silent")}
    assert all(0.35 < row.answer_s < 2 for row in load.results)


def test_a_port_where_nobody_listens_is_booked_as_refused() -> None:
    with server(answer) as port:
        pass
    assert {(row.status, row.error) for row in ask(port, seconds=0.2).results} == {(0, "refused")}


def test_latency_counts_from_when_a_request_was_due() -> None:
    def sleep_once(line: socket.socket, number: int) -> bool:
        time.sleep(0.2)
        return answer(line, number)

    with server(sleep_once) as port:
        load = ask(port)
    assert all(row.latency_s >= 0.2 for row in load.results)


def test_a_load_can_be_ended_early() -> None:
    with server(answer) as port:
        offered = Offer(Plan([Stream("desk", port, "/", {}, 40, even=True)], 60))
        time.sleep(0.5)
        load = offered.finish(now=True)
    assert 10 < len(load.results) < 60
