"""A session measures nothing that answers wrongly, and a system that fails costs only its own rows."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.catalogue import Model
from benchmarks.peers.lanes import JSON, Lane, from_columns, json_body
from benchmarks.processes import NotUp
from benchmarks.rounds import Cell, Session
from benchmarks.session import Bench, WrongNumbers, _growth, measure_session, verify
from benchmarks.systems import Running
from serve_app.engine import load_engine

THIRDS = [[1 / 3, 1 / 3, 1 / 3]]


class Answering(http.server.BaseHTTPRequestHandler):
    """200 with fixed class probabilities."""

    probabilities = THIRDS

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"classification_probs": self.probabilities}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(probabilities: list[list[float]]) -> Iterator[Running]:
    handler = type("Handler", (Answering,), {"probabilities": probabilities})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lane = Lane("/", JSON, json_body("data"), from_columns)
        yield Running(server.server_address[1], {"json": lane}, (), lambda pid, command: "server")
        server.shutdown()


class Stub:
    """A system that answers fixed probabilities, or does not come up."""

    name = title = "stub"
    lanes = ("json",)

    def __init__(self, probabilities: list[list[float]] | None) -> None:
        self._probabilities = probabilities

    @contextmanager
    def start(self, model: Model, folder: Path) -> Iterator[Running]:
        if self._probabilities is None:
            raise NotUp("the port was taken")
        with answering(self._probabilities) as up:
            yield up


def bench(folder: Path, system: Stub) -> Bench:
    engines = {"noop": load_engine(None, engine="noop")}
    return Bench({"stub": system}, {"noop": Model(engine="noop")}, folder, engines, lambda line: None)


def test_the_right_numbers_pass_and_others_do_not() -> None:
    windows = np.zeros((1, 50, 60), np.float32)
    with answering(THIRDS) as up:
        request = up.request("json", windows)
        verify(up, "json", request, np.array(THIRDS, np.float32))
        with pytest.raises(WrongNumbers, match="where our engine computes"):
            verify(up, "json", request, np.array([[0.3, 0.4, 0.3]], np.float32))


def test_a_system_that_answers_wrongly_gets_a_row_that_says_so_and_no_figures(tmp_path: Path) -> None:
    stub = Stub([[0.2, 0.5, 0.3]])
    (row,) = measure_session(bench(tmp_path, stub), Session("stub", "noop", (Cell("json", 1),)), seconds=1)
    assert (row["system"], row["model"], row["lane"]) == ("stub", "noop", "json")
    assert row["error"].startswith("WrongNumbers")
    assert "answered_rps" not in row


def test_a_system_that_does_not_come_up_gets_one_row(tmp_path: Path) -> None:
    session = Session("stub", "noop", (Cell("json", 1), Cell("json", 32)))
    rows = measure_session(bench(tmp_path, Stub(None)), session, seconds=1)
    assert rows == [{"system": "stub", "model": "noop", "error": "the port was taken"}]


def test_counters_are_told_by_their_growth() -> None:
    before, after = {"by_arm": {"ray_serve": 10.0}}, {"by_arm": {"ray_serve": 12.0, "legacy": 1.0}}
    assert _growth(before, after) == {"by_arm": {"ray_serve": 2.0, "legacy": 1.0}}
