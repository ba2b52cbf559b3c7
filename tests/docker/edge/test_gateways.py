"""Gateways that leave, come, die or are silent behind the edge, and what clients notice of it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.edge.conftest import GATEWAY
from tests.docker.edge.framings import post
from tests.docker.edge.load import WINDOW, Load
from tests.docker.edge.process import HOST, EdgeProcess, listen
from tests.docker.edge.recorder import ANSWER, Recorder
from tests.integration.processes import GatewayProcess, free_port, wait_until

pytestmark = pytest.mark.integration

GET = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
POST = post("Content-Length: 3", "Connection: close", body=b"abc")


@pytest.fixture
def second() -> Iterator[Recorder]:
    with Recorder() as second:
        yield second


@pytest.fixture
def pair(recorder: Recorder, second: Recorder) -> Iterator[EdgeProcess]:
    """Two gateways, one worker: the two are asked in turn, the first one first."""
    with EdgeProcess([recorder.address, second.address], EDGE_WORKERS="1") as edge:
        yield edge


def test_connections_to_a_gateway_are_kept(edge: EdgeProcess, recorder: Recorder) -> None:
    before = recorder.n_connections
    with edge.client() as client:
        for _ in range(20):
            assert client.get("/health").status_code == 200
    assert recorder.n_connections - before <= 2


def test_a_gateway_that_is_not_there_is_passed_over(second: Recorder) -> None:
    with EdgeProcess([f"127.0.0.1:{free_port()}", second.address], EDGE_WORKERS="1") as edge:
        assert [edge.say(message).statuses for message in (POST, GET, POST, GET)] == [[200]] * 4
    assert [request.body for request in second.requests] == [b"abc", b"", b"abc", b""]


def test_a_post_that_was_sent_is_never_sent_again(pair: EdgeProcess, recorder: Recorder, second: Recorder) -> None:
    recorder.answer = second.answer = b""
    assert pair.say(POST).statuses == [503]
    assert len(recorder.requests) + len(second.requests) == 1


def test_what_may_be_asked_twice_is_asked_at_the_other_gateway(
    pair: EdgeProcess, recorder: Recorder, second: Recorder
) -> None:
    recorder.answer = b""
    assert pair.say(GET).statuses == [200]
    assert (len(recorder.requests), len(second.requests)) == (1, 1)


def test_without_a_gateway_the_edge_says_when_to_come_again_and_finds_it_when_it_is_back(nginx: None) -> None:
    port = free_port()
    with EdgeProcess([f"127.0.0.1:{port}"]) as edge, edge.client() as client:
        away = client.post("/ray-serve/predict", content=WINDOW)
        assert (away.status_code, away.headers["Retry-After"]) == (503, "5")
        assert away.json()["type"] == "urn:sluice:problem:unavailable"
        assert client.post("/v2/models/m/infer").json() == {"error": "no gateway can be reached now; try again later"}
        with Recorder(port):
            assert client.post("/ray-serve/predict", content=WINDOW).status_code == 200


def test_a_silent_gateway_costs_the_deadline_and_no_more(recorder: Recorder, second: Recorder) -> None:
    recorder.answer = second.answer = None
    with EdgeProcess([recorder.address, second.address], EDGE_ANSWER_TIMEOUT_MS="1200") as edge:
        for message in (POST, GET):
            started = time.monotonic()
            said = edge.say(message, patience_s=5)
            assert said.statuses == [504]
            assert 1.2 <= time.monotonic() - started < 4
    assert len(recorder.requests) + len(second.requests) == 2


def test_a_gateways_own_refusals_are_passed_on_as_they_are(front: EdgeProcess) -> None:
    with front.client(source="127.0.0.40") as client:
        refused = client.post("/ray-serve/predict", content=WINDOW)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        assert refused.json()["instance"] == refused.headers["X-Request-Id"]
        assert client.get("/ray-serve/predict").headers["Allow"] == "POST"


def test_that_a_gateway_leaves_is_between_it_and_the_edge(edge: EdgeProcess, recorder: Recorder) -> None:
    recorder.answer = ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with edge.client() as client:
        answers = [client.get("/health") for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["Connection"] for answer in answers} == {"keep-alive"}


def test_the_edge_lets_go_of_an_idle_gateway_within_the_notice_that_one_gives(recorder: Recorder) -> None:
    with EdgeProcess([recorder.address], EDGE_WORKERS="1") as edge:
        before = recorder.n_open
        assert edge.say(POST).statuses == [200]
        assert recorder.n_open == before + 1
        wait_until(lambda: recorder.n_open == before, 5, "the edge to let go of its idle connection")


def n_predictions(edge: EdgeProcess) -> int:
    return sum(line["path"] == "/ray-serve/predict" for line in edge.log_lines())


def test_a_reload_loses_no_request(front: EdgeProcess, gateway: GatewayProcess) -> None:
    """One may meet the end of its idle connection: then no worker has seen it, and its client may send it again."""
    before = n_predictions(front)
    with Load(front, gateway.headers(), sends_again=True) as load:
        for _ in range(3):
            time.sleep(0.7)
            front.reload()
        time.sleep(0.7)
    assert set(load.counts()) == {"200"}
    assert load.counts()["200"] > 50
    assert load.n_sent_again <= 3 * 2  # once a reload for each client that keeps its connection
    assert n_predictions(front) - before == load.counts()["200"]


def test_what_was_begun_is_ended_before_the_edge_stops(recorder: Recorder) -> None:
    """Compose stops it with SIGQUIT."""
    recorder.answer = None
    with EdgeProcess([recorder.address]) as edge, edge.connect() as connection:
        connection.sendall(POST)
        wait_until(lambda: bool(recorder.requests), 3, "the request to arrive")
        edge.signal(signal.SIGQUIT)
        wait_until(lambda: not _listens(edge.port), 3, "the edge to stop listening")
        recorder.answer_now(ANSWER)
        assert listen(connection).statuses == [200]
        assert edge.wait(5) == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_new_workers_take_over_behind_the_edge_and_nobody_notices(tmp_path: Path) -> None:
    notice_ms = "4500"  # longer than the edge keeps an idle connection
    gateway = GatewayProcess(tmp_path, {**GATEWAY, "GATEWAY_DRAIN_NOTICE_MS": notice_ms})
    try:
        gateway.wait_for("legacy")
        before = gateway.worker_pids()
        with EdgeProcess([f"127.0.0.1:{gateway.port}"]) as edge, Load(edge, gateway.headers()) as load:
            os.kill(gateway.pid, signal.SIGHUP)
            wait_until(lambda: not set(before) & set(gateway.worker_pids()), 60, "another worker")
            time.sleep(1)
        assert set(load.counts()) == {"200"}
        assert load.counts()["200"] > 50
    finally:
        gateway.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gateways_that_restart_one_after_the_other_lose_nothing(tmp_path: Path) -> None:
    """A whole gateway that ends may refuse a few requests that are on their way to it; each is told so."""
    secret = secrets.token_urlsafe(48)

    def start(port: int | None = None) -> GatewayProcess:
        folder = tmp_path / str(time.monotonic_ns())
        folder.mkdir()
        gateway = GatewayProcess(folder, {**GATEWAY, "GATEWAY_DRAIN_NOTICE_MS": "5000"}, port=port, secret=secret)
        gateway.wait_for("legacy")
        return gateway

    gateways = [start(), start()]
    addresses = [f"127.0.0.1:{gateway.port}" for gateway in gateways]
    with EdgeProcess(addresses) as edge, Load(edge, gateways[0].headers()) as load:
        for i, gateway in enumerate(gateways):
            time.sleep(2)
            assert gateway.stop() == 0
            gateways[i] = start(gateway.port)
        time.sleep(2)
    for gateway in gateways:
        gateway.stop()
    print(load.counts())
    assert set(load.counts()) <= {"200", "503"}
