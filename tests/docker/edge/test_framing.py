"""Where a request ends: one reading of it, the edge's, and nothing of the other readings reaches a gateway."""

from __future__ import annotations

import pytest

from tests.docker.edge.frames import Http2
from tests.docker.edge.framings import HIDDEN, MUTATIONS, chunked, post
from tests.docker.edge.process import HOST, EdgeProcess
from tests.docker.edge.recorder import Recorder
from tests.integration.processes import GatewayProcess

pytestmark = pytest.mark.integration

# RFC 9112, 2.2: a recipient may take a bare line feed for a line's end, and nginx does.
LENIENT = {
    "a bare line feed after the size": chunked(b"1\na\r\n0\r\n\r\n"),
    "a bare line feed after an extension": chunked(b"1;x\na\r\n0\r\n\r\n"),
    "bare line feeds after the data": chunked(b"1\r\na\n0\n\n"),
    "data that end with a carriage return": chunked(b"2\r\na\r\n0\r\n\r\n"),
    "a trailer that names a length": chunked(b"1\r\na\r\n0\r\nContent-Length: 9\r\n\r\n"),
    "nothing odd": chunked(b"1\r\na\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_request_of_two_readings_is_refused_and_the_connection_ended(
    edge: EdgeProcess, recorder: Recorder, name: str
) -> None:
    said = edge.say(MUTATIONS[name])
    assert said.statuses == [400]
    assert said.ended
    assert not recorder.requests
    assert len(said.data) < 4096


@pytest.mark.parametrize("name", LENIENT)
def test_after_chunks_nothing_is_read_as_a_request(edge: EdgeProcess, recorder: Recorder, name: str) -> None:
    said = edge.say(LENIENT[name])
    assert said.ended
    assert said.statuses == [200]
    assert [(request.target, request.header("Transfer-Encoding")) for request in recorder.requests] == [
        (b"/v2/open", [])
    ]


def test_the_gateway_gets_what_the_edge_read_and_not_what_was_sent(edge: EdgeProcess, recorder: Recorder) -> None:
    said = edge.say(f"POST /v2/open HTTP/1.1\nHost: {HOST}\nContent-Length: 3\nConnection: close\n\nabc".encode())
    assert said.statuses == [200]
    (request,) = recorder.requests
    assert (request.body, request.header("Content-Length")) == (b"abc", ["3"])


def test_a_whole_request_may_follow_a_whole_request(edge: EdgeProcess, recorder: Recorder) -> None:
    said = edge.say(post("Content-Length: 3", body=b"abc" + HIDDEN))
    assert said.statuses == [200, 200]
    assert [request.target for request in recorder.requests] == [b"/v2/open", b"/v2/hidden"]


def test_a_real_gateway_is_asked_none_of_it(front: EdgeProcess, gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        before = _requests_seen(client.get("/metrics").text)
        for mutation in MUTATIONS.values():
            assert front.say(mutation).statuses == [400]
        assert _requests_seen(client.get("/metrics").text) == before + 1  # the question before


def _requests_seen(metrics: str) -> int:
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in metrics.splitlines()
        if line.startswith("http_requests_total") and "/health" not in line
    )


PLAIN = [(":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/v2/open")]


def replaced(name: str, value: str) -> list[tuple[str, str]]:
    return [(key, value if key == name else old) for key, old in PLAIN]


HTTP2_MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "chunked": [*PLAIN, ("transfer-encoding", "chunked")],
    "chunked and length": [*PLAIN, ("content-length", "3"), ("transfer-encoding", "chunked")],
    "an unknown coding": [*PLAIN, ("transfer-encoding", "gzip")],
    "length twice": [*PLAIN, ("content-length", "3"), ("content-length", "4")],
    "too short a length": [*PLAIN, ("content-length", "1")],
    "too long a length": [*PLAIN, ("content-length", "9")],
    "a signed length": [*PLAIN, ("content-length", "+3")],
    "a line end in a value": [*PLAIN, ("x", "y\r\ntransfer-encoding: chunked")],
    "a line feed in a value": [*PLAIN, ("x", "y\ntransfer-encoding: chunked")],
    "NUL in a value": [*PLAIN, ("x", "y\0")],
    "a line end in a name": [*PLAIN, ("x\r\ntransfer-encoding", "chunked")],
    "a colon in a name": [*PLAIN, ("x: y", "z")],
    "a space in a name": [*PLAIN, ("transfer-encoding ", "chunked")],
    "a capital in a name": [*PLAIN, ("Transfer-Encoding", "chunked")],
    "a line end in the path": replaced(":path", "/v2/open HTTP/1.1\r\nX: y"),
    "a space in the path": replaced(":path", "/v2/open HTTP/1.1"),
    "a path without a slash": replaced(":path", "v2/open"),
    "an empty path": replaced(":path", ""),
    "a line end in the method": replaced(":method", "POST / HTTP/1.1\r\nX:"),
    "a space in the method": replaced(":method", "POST /x"),
    "an empty method": replaced(":method", ""),
    "a path in the authority": replaced(":authority", f"{HOST}/x"),
    "another host": [*PLAIN, ("host", "other.test")],
    "no path": PLAIN[:3],
    "no method": PLAIN[1:],
    "path twice": [*PLAIN, (":path", "/v2/other")],
    "method twice": [(":method", "GET"), *PLAIN],
    "an unknown pseudo header": [*PLAIN, (":protocol", "websocket")],
    "a pseudo header after others": [*PLAIN[:3], ("x", "y"), PLAIN[3]],
}


@pytest.mark.parametrize("name", HTTP2_MUTATIONS)
def test_http2_brings_nothing_to_a_gateway_that_http1_could_not(
    edge: EdgeProcess, recorder: Recorder, name: str
) -> None:
    with Http2(edge) as client:
        answer = client.ask(HTTP2_MUTATIONS[name], b"abc")
    assert answer is None or 400 <= answer < 500 or _is_clean(recorder), answer
    assert len(recorder.requests) <= 1


def _is_clean(recorder: Recorder) -> bool:
    """The one request that arrived is framed by one right length."""
    (request,) = recorder.requests
    is_framed = request.header("Content-Length") == ["3"] and request.body == b"abc"
    return is_framed and not request.header("Transfer-Encoding") and request.target == b"/v2/open"
