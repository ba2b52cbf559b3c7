"""Who is slow loses the connection, whatever the part that is slow; no gateway waits for it meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator

import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame

from tests.docker.edge.frames import PREFACE, Http2
from tests.docker.edge.framings import post
from tests.docker.edge.process import HOST, EdgeProcess, listen
from tests.docker.edge.recorder import ANSWER, Recorder
from tests.integration.processes import wait_until

pytestmark = pytest.mark.integration

SLACK_S = 3.0  # on top of a deadline of one second, on a busy machine
GET = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n".encode()
POST = [(":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/v2/open")]


@pytest.fixture(scope="module")
def hasty(shared_recorder: Recorder) -> Iterator[EdgeProcess]:
    """An edge whose every deadline is one second."""
    deadlines = dict.fromkeys(
        ("EDGE_HEADER_TIMEOUT_S", "EDGE_BODY_TIMEOUT_S", "EDGE_SEND_TIMEOUT_S", "EDGE_IDLE_TIMEOUT_S"), "1"
    )
    with EdgeProcess([shared_recorder.address], **deadlines) as edge:
        yield edge


def drip(connection: socket.socket, parts: Iterator[bytes], interval_s: float = 0.2, limit_s: float = 8.0) -> float:
    """Send part after part until the other side has had enough; returns the seconds that it took."""
    started = time.monotonic()
    connection.settimeout(interval_s)
    with contextlib.suppress(OSError):
        while time.monotonic() - started < limit_s:
            connection.sendall(next(parts))
            with contextlib.suppress(TimeoutError):
                if not connection.recv(4096):
                    break
    return time.monotonic() - started


def patience(connection: socket.socket) -> float:
    """Seconds until the other side ends the connection."""
    started = time.monotonic()
    connection.settimeout(8)
    assert listen(connection).ended
    return time.monotonic() - started


def raw(edge: EdgeProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", edge.port), 5)


def test_a_connection_that_says_nothing_is_ended(hasty: EdgeProcess) -> None:
    with raw(hasty) as connection:
        assert patience(connection) < 1 + SLACK_S


def test_a_handshake_that_stops_halfway_is_ended(hasty: EdgeProcess) -> None:
    with raw(hasty) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert patience(connection) < 1 + SLACK_S


def test_a_handshake_without_a_request_is_ended(hasty: EdgeProcess) -> None:
    with hasty.connect() as connection:
        assert patience(connection) < 1 + SLACK_S


def test_headers_have_one_deadline_for_all_of_them(hasty: EdgeProcess, recorder: Recorder) -> None:
    with hasty.connect() as connection:
        connection.sendall(GET)
        assert drip(connection, (f"X-{i}: a\r\n".encode() for i in itertools.count())) < 1 + SLACK_S
    assert not recorder.requests


def test_a_request_line_byte_by_byte_has_the_same(hasty: EdgeProcess) -> None:
    with hasty.connect() as connection:
        assert drip(connection, (bytes([byte]) for byte in b"GET /" + b"a" * 1000)) < 1 + SLACK_S


def test_a_body_that_pauses_is_given_up_and_no_gateway_saw_it(hasty: EdgeProcess, recorder: Recorder) -> None:
    with hasty.connect() as connection:
        connection.sendall(post("Content-Length: 1000", body=b"a" * 999))
        assert patience(connection) < 1 + SLACK_S
    with hasty.connect() as connection:
        connection.sendall(post("Transfer-Encoding: chunked", body=b"3\r\nab"))
        assert patience(connection) < 1 + SLACK_S
    assert not recorder.requests


def test_a_slow_body_reaches_the_gateway_whole_or_not_at_all(hasty: EdgeProcess, recorder: Recorder) -> None:
    with hasty.connect() as connection:
        connection.sendall(post("Content-Length: 10", "Connection: close", body=b""))
        for _ in range(9):
            time.sleep(0.2)
            connection.sendall(b"a")
        assert not recorder.requests
        connection.sendall(b"b")
        assert listen(connection).statuses == [200]
    assert [request.body for request in recorder.requests] == [b"aaaaaaaaab"]


def test_an_idle_connection_is_ended(hasty: EdgeProcess) -> None:
    with hasty.connect() as connection:
        connection.sendall(GET + b"\r\n")
        assert patience(connection) < 1 + SLACK_S


def test_an_answer_that_nobody_reads_is_given_up_and_the_gateway_is_free_at_once(
    hasty: EdgeProcess, recorder: Recorder
) -> None:
    size_bytes = 7 << 20
    recorder.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size_bytes + bytes(size_bytes)
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", hasty.port))
        with hasty.context().wrap_socket(unread, server_hostname=HOST) as connection:
            connection.sendall(GET + b"\r\n")
            wait_until(
                lambda: bool(recorder.requests) and recorder.requests[0].is_answered, 3, "the gateway to be free"
            )
            time.sleep(2.5)
            said = listen(connection)
    assert said.ended
    assert len(said.data) < size_bytes
    recorder.answer = ANSWER
    assert hasty.say(GET + b"Connection: close\r\n\r\n").statuses == [200]


def test_http2_without_a_request_is_ended(hasty: EdgeProcess) -> None:
    with hasty.connect("127.0.0.1", "h2") as connection:
        connection.sendall(PREFACE)
        assert patience(connection) < 1 + SLACK_S


def test_http2_headers_have_one_deadline(hasty: EdgeProcess, recorder: Recorder) -> None:
    with hasty.connect("127.0.0.1", "h2") as connection:
        connection.sendall(PREFACE + b"\0\0\0\x04\0\0\0\0\0" + HeadersFrame(1, data=b"\x83").serialize())
        parts = (ContinuationFrame(1, data=b"\x40\x01x\x01a").serialize() for _ in itertools.count())
        assert drip(connection, parts) < 1 + SLACK_S
    assert not recorder.requests


def test_an_http2_body_that_pauses_is_given_up(hasty: EdgeProcess, recorder: Recorder) -> None:
    with Http2(hasty) as client:
        head, data = client.request([*POST, ("content-length", "9")], b"abc")
        data.flags.discard("END_STREAM")
        started = time.monotonic()
        client.send([head, data])
        list(client.frames())
    assert time.monotonic() - started < 1 + 2 * SLACK_S
    assert not recorder.requests


def test_an_http2_answer_without_a_window_is_given_up(hasty: EdgeProcess, recorder: Recorder) -> None:
    initial_window_size = 4
    with Http2(hasty, settings={initial_window_size: 0}) as client:
        client.send(client.request([(":method", "GET"), *POST[1:]]))
        started = time.monotonic()
        list(client.frames())
    assert time.monotonic() - started < 1 + 2 * SLACK_S
    assert recorder.requests[0].is_answered
