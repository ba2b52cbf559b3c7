"""What is too large is refused while it arrives, costs no memory, and reaches no gateway."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest

from tests.docker.edge.frames import Http2
from tests.docker.edge.framings import post
from tests.docker.edge.process import HOST, EdgeProcess, listen
from tests.docker.edge.recorder import Recorder

pytestmark = pytest.mark.integration

POST = [(":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/v2/open")]
MIB = 1 << 20
BODY_LIMIT = MIB


def get(*lines: bytes, target: bytes = b"/health") -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: " + HOST.encode(), *lines, b"", b""])


HEADER_BOMBS = {
    "32 MiB in 320 headers": get(*[b"X: " + b"a" * 100_000] * 320),
    "100,000 headers": get(*[b"X: a"] * 100_000),
    "one long header": get(b"X: " + b"a" * 8192),
    "one endless header": get(b"X: " + b"a" * 4 * MIB),
    "one endless name": get(b"X" * 4 * MIB + b": a"),
    "17 KiB in 40 headers": get(*[b"X: " + b"a" * 432] * 40),
    "101 headers": get(*[b"X: a"] * 100),
    "101 headers without a value": get(*[b"X:"] * 100),
}


@pytest.mark.parametrize("name", HEADER_BOMBS)
def test_headers_beyond_the_limits_are_refused(edge: EdgeProcess, recorder: Recorder, name: str) -> None:
    before = edge.memory_bytes()
    said = edge.say(HEADER_BOMBS[name])
    assert said.statuses in ([431], [400], [])  # none when the connection is reset under what is still being sent
    assert said.ended
    assert not recorder.requests
    assert edge.memory_bytes() - before < 8 * MIB


def test_as_many_headers_as_may_be_are_passed_on(edge: EdgeProcess, recorder: Recorder) -> None:
    said = edge.say(get(*[b"X-%d: " % i + b"a" * 120 for i in range(98)], b"Connection: close"))
    assert said.statuses == [200]
    assert sum(name.startswith(b"X-") and name[2:].isdigit() for name, _ in recorder.requests[0].headers) == 98


@pytest.mark.parametrize(("length", "status"), [(7000, 200), (7168, 414), (100_000, 414)])
def test_a_target_has_a_longest_length(edge: EdgeProcess, recorder: Recorder, length: int, status: int) -> None:
    said = edge.say(get(b"Connection: close", target=b"/v2/" + b"a" * (length - 4)))
    assert said.statuses == [status]
    assert said.ended


@pytest.mark.parametrize(
    ("length", "status", "http2"), [(BODY_LIMIT, 200, False), (BODY_LIMIT, 200, True), (BODY_LIMIT + 1, 413, False)]
)
def test_a_body_may_be_as_long_as_the_gateway_takes(
    edge: EdgeProcess, recorder: Recorder, length: int, status: int, http2: bool
) -> None:
    with edge.client(http2=http2) as client:
        answer = client.post("/ray-serve/predict", content=bytes(length))
    assert answer.status_code == status
    assert [len(request.body) for request in recorder.requests] == ([length] if status == 200 else [])


def test_a_body_that_says_it_is_too_long_is_not_read(edge: EdgeProcess, recorder: Recorder) -> None:
    said = edge.say(post(f"Content-Length: {1 << 30}", body=b""))
    assert said.statuses == [413]
    with Http2(edge) as client:
        assert client.ask([*POST, ("content-length", str(1 << 30))], b"abc") == 413
    assert not recorder.requests


def test_http2s_headers_have_the_same_limits(edge: EdgeProcess, recorder: Recorder) -> None:
    bombs = {
        "101 headers": [("x", "a")] * 101,
        "one long header": [("x", "~" * 8192)],  # a letter would take five bits
        "one long header of short bits": [("x", "a" * 16384)],
        "17 KiB in 40 headers": [(f"x-{i}", "a" * 432) for i in range(40)],
        "100,000 bytes of one repeated entry": [("x", "a" * 4000)] * 25,
    }
    for name, bomb in bombs.items():
        with Http2(edge) as client:
            assert client.ask([*POST, *bomb]) in (431, 400, None), name
    assert not recorder.requests


@pytest.mark.parametrize("chunk_bytes", [1, 65536])
def test_a_body_without_an_end_is_cut_off(edge: EdgeProcess, recorder: Recorder, chunk_bytes: int) -> None:
    chunk = b"%x\r\n" % chunk_bytes + bytes(chunk_bytes) + b"\r\n"
    before = edge.memory_bytes()
    with edge.connect() as connection:
        connection.sendall(post("Transfer-Encoding: chunked", body=b""))
        sent, answer = 0, b""
        with contextlib.suppress(OSError):
            while sent < 64 * MIB:
                connection.sendall(chunk * (65536 // chunk_bytes))
                sent += 65536
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(64)
                    break
                connection.settimeout(15)
        assert answer.startswith(b"HTTP/1.1 413") or not answer  # a reset may overtake it
    assert sent < 8 * MIB  # a megabyte counts, the rest are socket buffers on the way
    assert not recorder.requests
    assert edge.memory_bytes() - before < 8 * MIB


def test_refusals_are_problems_in_the_gateways_form(edge: EdgeProcess, recorder: Recorder) -> None:
    with edge.client() as client:
        too_large = client.post("/ray-serve/predict", content=bytes(BODY_LIMIT + 1))
        open_inference = client.post("/v2/models/m/infer", content=bytes(BODY_LIMIT + 1))
    assert too_large.headers["Content-Type"] == "application/problem+json"
    assert too_large.json() == {
        "type": "urn:sluice:problem:body-too-large",
        "title": "The body is too large",
        "status": 413,
        "detail": "a body may have at most 1048576 bytes",
        "instance": too_large.headers["X-Request-Id"],
    }
    assert open_inference.headers["Content-Type"] == "application/json"
    assert open_inference.json() == {"error": "a body may have at most 1048576 bytes"}
    for answer in (too_large, open_inference):
        assert answer.headers["Strict-Transport-Security"] == "max-age=63072000"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Server"] == "nginx"


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "bad-request"),
        (get(target=b"/nowhere"), 404, "not-found"),
        (get(target=b"/health").replace(b"GET", b"TRACE"), 405, "method-not-allowed"),
        (get(target=b"/health").replace(b"GET", b"PROPFIND"), 405, "method-not-allowed"),
        (get(target=b"/" + b"a" * 9000), 414, "target-too-long"),
        (get(b"X: " + b"a" * 9000), 431, "head-too-large"),
        (b"GET /health HTTP/1.1\r\nHost: other.test\r\n\r\n", 421, "misdirected-request"),
    ],
)
def test_every_refusal_is_a_small_problem_that_repeats_nothing(
    edge: EdgeProcess, message: bytes, status: int, code: str
) -> None:
    said = edge.say(message)
    assert said.statuses == [status]
    head, _, body = said.data.partition(b"\r\n\r\n")
    problem = json.loads(body)
    assert problem["type"] == f"urn:sluice:problem:{code}"
    assert problem["status"] == status
    assert f"X-Request-Id: {problem['instance']}".encode() in head
    assert b"application/problem+json" in head
    assert (b"Allow: GET, HEAD, OPTIONS, POST, PUT" in head) == (status == 405)
    assert b"other.test" not in said.data
    assert b"aaaa" not in said.data
    assert b"nginx/" not in said.data
    assert len(said.data) < 4096


def test_plain_http_is_not_served(edge: EdgeProcess, recorder: Recorder) -> None:
    with socket.create_connection(("127.0.0.1", edge.port), 2) as connection:
        connection.sendall(get())
        said = listen(connection)
    assert said.statuses == [400]
    assert said.ended
    assert not recorder.requests
