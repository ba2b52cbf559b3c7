"""What a good client notices of a thousand slow ones: measured in turn, with them and without them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pytest

from tests.docker.edge.load import WINDOW
from tests.docker.edge.process import HOST, EdgeProcess
from tests.docker.edge.slow_clients import Attack
from tests.integration.processes import ROOT, GatewayProcess

pytestmark = pytest.mark.integration

HELD_LIMIT_S = 60.0
SETTLED_S = 3.0  # until what they ask for at first is answered


@dataclass(frozen=True)
class Round:
    """Latencies of one good client's requests, in seconds, and how many of them were not answered with 200."""

    seconds: list[float]
    n_failed: int

    def percentile_ms(self, percent: int) -> float:
        return 1e3 * statistics.quantiles(self.seconds, n=100)[percent - 1]


class GoodClient:
    """Asks for a prediction at a steady pace over one kept connection."""

    def __init__(self, edge: EdgeProcess, gateway: GatewayProcess) -> None:
        self._edge = edge
        self._headers = {**gateway.headers(), "Content-Type": "application/octet-stream", "Host": HOST}
        self._connection = http.client.HTTPSConnection("127.0.0.1", edge.port, timeout=10)

    def ask_for(self, seconds: float, rate_hz: float = 100.0) -> Round:
        answered, failed = [], 0
        started = due = time.monotonic()
        while due < started + seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            if self._ask() == 200:
                answered.append(time.monotonic() - due)  # from when it was due: waiting for its turn counts
            else:
                failed += 1
            due += 1 / rate_hz
        return Round(answered, failed)

    def close(self) -> None:
        self._connection.close()

    def _ask(self) -> int:
        if self._connection.sock is None:
            self._connection.sock = self._edge.connect("127.0.0.9")
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.request("POST", "/ray-serve/predict", WINDOW, self._headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status


def held_between(lines: IO[str], began: float, ended: float) -> list[int]:
    """The slow clients' counts from when a block began until the first one after its end."""
    counts = []
    for line in lines:
        told = json.loads(line)
        if told["at"] >= began:
            counts.append(told["held"])
        if told["at"] >= ended:
            break
    return counts


@contextlib.contextmanager
def slow_clients(edge: EdgeProcess, gateway: GatewayProcess, n: int) -> Iterator[None]:
    """Slow clients, nine of ten of which hold a connection when the block begins, and do as a rule until it ends."""
    attack = Attack(edge.port, str(edge.folder / "ca.crt"), gateway.headers(subject="slow")["Authorization"], n)
    process = subprocess.Popen(
        # They are elsewhere in earnest: what they cost to imitate is not to be taken from the edge and the gateway.
        ["chrt", "--idle", "0", sys.executable, "-m", "tests.docker.edge.slow_clients"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(vars(attack)) + "\n")
        process.stdin.flush()
        deadline = time.monotonic() + HELD_LIMIT_S
        while json.loads(process.stdout.readline())["held"] < 0.9 * n:
            assert time.monotonic() < deadline
        time.sleep(SETTLED_S)
        began = time.monotonic()
        yield
        held = held_between(process.stdout, began, time.monotonic())
        print("slow connections held meanwhile:", *held)
        assert (
            statistics.median_high(held) >= 0.9 * n
        )  # the median: those that lose theirs at once need a moment to be back
    finally:
        process.kill()
        process.communicate()


def measure(
    edge: EdgeProcess, gateway: GatewayProcess, *, n_slow: int, n_rounds: int, seconds: float
) -> tuple[list[Round], list[Round]]:
    """Rounds without and with slow clients, taken in turn."""
    quiet, slow = [], []
    good = GoodClient(edge, gateway)
    good.ask_for(0.5)
    for _ in range(n_rounds):
        quiet.append(good.ask_for(seconds))
        with slow_clients(edge, gateway, n_slow):
            slow.append(good.ask_for(seconds))
    good.close()
    return quiet, slow


def report(quiet: list[Round], slow: list[Round]) -> float:
    """Print the rounds; returns how many times the p99 is what it was, by the medians."""
    for percent in (50, 99):
        rows = [[r.percentile_ms(percent) for r in rounds] for rounds in (quiet, slow)]
        medians = [statistics.median(row) for row in rows]
        for name, row in zip(("without", "with"), rows, strict=True):
            print(f"p{percent} {name:8}", " ".join(f"{value:6.1f}" for value in row), "ms")
        print(f"p{percent} medians {medians[0]:.1f} and {medians[1]:.1f} ms: {medians[1] / medians[0]:.2f} times")
    return medians[1] / medians[0]


def test_a_hundred_slow_clients_cost_a_good_one_no_answer(front: EdgeProcess, gateway: GatewayProcess) -> None:
    quiet, slow = measure(front, gateway, n_slow=100, n_rounds=1, seconds=2)
    report(quiet, slow)
    assert [r.n_failed for r in (*quiet, *slow)] == [0, 0]
    assert slow[0].percentile_ms(50) < 1000  # far above what is expected: it must not wait for them


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_thousand_slow_clients_at_most_double_a_good_ones_p99(front: EdgeProcess, gateway: GatewayProcess) -> None:
    memory = front.memory_bytes()
    quiet, slow = measure(front, gateway, n_slow=1000, n_rounds=7, seconds=5)
    ratio = report(quiet, slow)
    print(f"the edge's memory grew by {(front.memory_bytes() - memory) / 2**20:.0f} MiB")
    assert sum(r.n_failed for r in (*quiet, *slow)) == 0
    assert ratio <= 2
