"""One address gets its share and no more; who comes from another one does not notice."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from tests.docker.edge.frames import Http2
from tests.docker.edge.process import HOST, EdgeProcess, listen
from tests.docker.edge.recorder import Recorder
from tests.integration.processes import wait_until

pytestmark = pytest.mark.integration

CLOSING = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
KEEPING = CLOSING.replace(b"Connection: close\r\n", b"")
GET = [(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/v2/open")]
CAP = 64


def statuses_of(edge: EdgeProcess, n: int, source: str) -> list[int]:
    return [status for _ in range(n) for status in edge.say(CLOSING, source).statuses]


@pytest.mark.parametrize("opening", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "halfway through the handshake"])
def test_connections_count_before_they_say_anything(edge: EdgeProcess, opening: bytes) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(CAP):
            raw = socket.create_connection(("127.0.0.1", edge.port), 5, source_address=("127.0.0.5", 0))
            stack.enter_context(raw).sendall(opening)
        one_more = stack.enter_context(
            socket.create_connection(("127.0.0.1", edge.port), 2, source_address=("127.0.0.5", 0))
        )
        assert listen(one_more) == (b"", True)
        assert edge.say(CLOSING, "127.0.0.6").statuses == [200]
    wait_until(lambda: edge_takes(edge, "127.0.0.5"), 5, "the address to be let in again")


def edge_takes(edge: EdgeProcess, source: str) -> bool:
    with contextlib.suppress(OSError):
        return edge.say(CLOSING, source).statuses == [200]
    return False


def test_streams_count_as_connections_do(edge: EdgeProcess, recorder: Recorder) -> None:
    recorder.answer = None  # every request stays where it is
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Http2(edge, "127.0.0.7")) for _ in range(3)]
        for client in clients[:2]:
            client.send([frame for _ in range(32) for frame in client.request(GET)])
        wait_until(lambda: len(recorder.requests) == CAP, 3, "all streams to be at the gateway")
        assert clients[2].ask(GET) == 429
        assert clients[0].ask(GET) is None  # a connection has 32 streams at once, and no more
    assert len(recorder.requests) == CAP


@pytest.fixture(scope="module")
def strict(shared_recorder: Recorder) -> Iterator[EdgeProcess]:
    with EdgeProcess([shared_recorder.address], EDGE_REQUESTS_PER_SECOND="5") as edge:
        yield edge


def test_requests_of_one_address_have_a_rate(strict: EdgeProcess, recorder: Recorder) -> None:
    assert statuses_of(strict, 4, "127.0.0.2") == [200] * 4
    statuses = statuses_of(strict, 30, "127.0.0.2")
    assert statuses.count(429) > 10
    assert set(statuses) == {200, 429}
    assert statuses_of(strict, 1, "127.0.0.3") == [200]


def test_the_refusal_says_when_to_come_again_and_keeps_the_connection(strict: EdgeProcess) -> None:
    with strict.client(source="127.0.0.4") as client:
        answers = [client.get("/health") for _ in range(30)]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["Connection"] == "keep-alive"
    assert refused.json()["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"


def asked_by(edge: EdgeProcess, address: str) -> int:
    """Status of a request of a client of any address: the http layer believes the stream layer about it."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(2)
        raw.connect(edge.socket_path)
        family = "TCP6" if ":" in address else "TCP4"
        raw.sendall(f"PROXY {family} {address} {address} 1 2\r\n".encode())
        with edge.context().wrap_socket(raw, server_hostname=HOST) as connection:
            connection.sendall(CLOSING)
            return listen(connection).statuses[0]


def test_a_network_of_ipv6_is_one_address(strict: EdgeProcess) -> None:
    """A host may take any address of its /64."""
    statuses = [asked_by(strict, f"2001:db8:0:1::{i:x}") for i in range(1, 30)]
    assert statuses.count(429) > 10
    assert asked_by(strict, "2001:db8:0:2::1") == 200
    assert [asked_by(strict, f"192.0.2.{i}") for i in range(1, 10)] == [200] * 9


def test_a_flood_of_resets_ends_its_connection_and_nobody_elses(edge: EdgeProcess, recorder: Recorder) -> None:
    """CVE-2023-44487: requests taken back as soon as they are sent never count as concurrent."""
    n_sent = 0
    with Http2(edge, "127.0.0.8") as client, edge.client(http2=True, source="127.0.0.9") as good:
        with contextlib.suppress(OSError):
            for _ in range(50):
                frames = [frame for _ in range(100) for frame in (*client.request(GET), client.reset())]
                client.send(frames, give_up=True)
                n_sent += 100
        assert client.is_ended()
        assert good.get("/health").status_code == 200
    assert n_sent < 5000 or len(recorder.requests) <= 1100


def test_a_full_edge_closes_idle_connections_for_new_ones(recorder: Recorder) -> None:
    """The accept cap: with room for some twenty clients, thirty idle ones keep nobody out."""
    crowded = EdgeProcess([recorder.address], EDGE_WORKER_CONNECTIONS="100", EDGE_WORKERS="1")
    with crowded as edge, contextlib.ExitStack() as stack:
        idle = []
        for i in range(60):
            connection = stack.enter_context(edge.connect(f"127.0.1.{i + 1}"))
            connection.sendall(KEEPING)
            assert b"200 OK" in connection.recv(4096), i
            idle.append(connection)
        assert statuses_of(edge, 5, "127.0.0.9") == [200] * 5
        ended = []
        for connection in idle:
            connection.settimeout(0.01)
            ended.append(listen(connection).ended)
    assert any(ended)
    assert not any(ended[-5:])  # the longest idle went first


def test_the_address_is_the_connections_whatever_a_client_says(front: EdgeProcess) -> None:
    """Failed log-ins are counted by address: an attacker cannot move his to another, nor fall behind another's."""
    headers = [{"X-Forwarded-For": f"198.51.100.{i}", "Authorization": "Bearer no"} for i in range(1, 41)]
    with front.client(source="127.0.0.20") as attacker:
        answers = [attacker.post("/ray-serve/predict", headers=lines).status_code for lines in headers]
    assert 429 in answers
    with front.client(source="127.0.0.21") as other:
        assert other.post("/ray-serve/predict", headers=headers[0]).status_code == 401


def test_nothing_that_a_client_says_of_itself_reaches_the_gateway(edge: EdgeProcess, recorder: Recorder) -> None:
    lies = {
        "X-Forwarded-For": "198.51.100.1, 10.0.0.1",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "other.test",
        "X-Forwarded-Port": "1",
        "X_Forwarded_For": "198.51.100.1",
        "X-Real-IP": "198.51.100.1",
        "Forwarded": "for=198.51.100.1",
        "Proxy": "http://198.51.100.1",
        "Proxy-Authorization": "Basic eA==",
        "Proxy-Connection": "keep-alive",
        "Keep-Alive": "timeout=9",
        "TE": "trailers",
        "Trailer": "X",
        "Upgrade": "h2c",
        "Via": "1.1 other",
        "Cookie": "a=b",
    }
    with edge.client(source="127.0.0.22") as client:
        client.get("/health", headers={**lies, "Connection": "upgrade, x-route-key", "X-Route-Key": "kept"})
    (request,) = recorder.requests
    left = {name.decode().lower(): value.decode() for name, value in request.headers}
    assert left["x-forwarded-for"] == "127.0.0.22"
    assert left["x-forwarded-proto"] == "https"
    assert left["host"] == HOST
    assert left.keys() & {name.lower() for name in (*lies, "Connection")} == {"x-forwarded-for", "x-forwarded-proto"}
    assert left["x-route-key"] == "kept"


def test_lies_in_http2_fare_no_better(edge: EdgeProcess, recorder: Recorder) -> None:
    with Http2(edge, "127.0.0.23") as client:
        assert client.ask([*GET, ("x-forwarded-for", "198.51.100.1"), ("x-real-ip", "198.51.100.1")]) == 200
    assert recorder.requests[0].header("X-Forwarded-For") == ["127.0.0.23"]
    assert recorder.requests[0].header("X-Real-IP") == []


def test_a_refusal_by_the_rate_speaks_the_protocol_of_its_path(strict: EdgeProcess) -> None:
    with Http2(strict, "127.0.0.24") as client:
        statuses = [client.ask(GET) for _ in range(20)]
    assert 429 in statuses
    said = [strict.say(CLOSING.replace(b"/health", b"/v2/open"), "127.0.0.24").data for _ in range(3)]
    assert any(json.loads(data.partition(b"\r\n\r\n")[2]).keys() == {"error"} for data in said)


@pytest.mark.parametrize(
    ("path", "host", "status", "source"),
    [
        ("/nothing", HOST, 404, "127.0.2.1"),
        ("/rollout", HOST, 404, "127.0.2.2"),
        ("/health%2e", HOST, 404, "127.0.2.3"),
        ("/v2//open", HOST, 400, "127.0.2.4"),
        ("/v2/" + "a" * 8000, HOST, 414, "127.0.2.5"),
        ("/health", "other.test", 421, "127.0.2.6"),
    ],
    ids=["no route", "an operator's route", "an escape", "an empty segment", "a long target", "another host"],
)
def test_what_the_edge_refuses_counts_as_what_it_passes_on(
    strict: EdgeProcess, path: str, host: str, status: int, source: str
) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    said = [strict.say(request, source) for _ in range(20)]
    statuses = [code for each in said for code in each.statuses]
    assert statuses[:5] == [status] * 5
    assert statuses.count(429) > 5
    assert set(statuses) == {status, 429}
    assert all(each.ended for each in said)  # nothing more is read there, whatever the answer
    assert statuses_of(strict, 1, source) == [429]


def test_refusals_over_one_connection_of_http2_are_limited(strict: EdgeProcess) -> None:
    with Http2(strict, "127.0.0.25") as client:
        statuses = [client.ask([*GET[:3], (":path", "/nothing")]) for _ in range(30)]
    assert statuses.count(429) > 15
    assert set(statuses) == {404, 429}
