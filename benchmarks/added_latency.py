"""What the gateway and Ray add to the bare engine, at one connection.

Starts `sluice serve --local` on a free port and runs rounds of two parts. First the engine alone in this process, one
call after another on one thread: its best case, with everything it needs in the caches. Then the engine and the
gateway in turn, one call each: now the engine finds the caches as any caller does between whose calls something else
runs. The served window travels as a raw float32 body through gateway, bridge and replica.

Reported are each round's medians and the added latency, served less engine, against both: in turn, and against the
hot loop, with its median and spread over the rounds.

    python benchmarks/added_latency.py [--rounds 5] [--calls 300]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np

from app.auth import mint_token
from app.development import development_secret
from app.settings import read_secret_file
from serve_app.bars import load_bars
from serve_app.contract import FloatArray, Options
from serve_app.engine import load_engine
from serve_app.features import latest_window
from serve_app.registry import Registry

READY_TIMEOUT_S = 180.0


def main() -> None:
    arguments = parse()
    window = latest_window(load_bars("MSFT").ohlcv)
    engine = load_engine(Registry(Path("models")).load("cnn_lstm"), threads=1)
    engine.warm_up()
    batch = window[np.newaxis]
    with running_gateway() as port, closing_connection(port) as connection:
        served = through_gateway(connection, window)
        expect_ray_serve(connection, served)
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(one_round(lambda: engine.predict(batch, Options()), served, arguments.calls))
            print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    report(rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=300)
    return parser.parse_args()


@contextlib.contextmanager
def running_gateway() -> Iterator[int]:
    """`sluice serve --local` on a free port, ended as Ctrl-C ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "app.cli", "serve", "--local", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_until_healthy(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait_until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            arms = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()["arms"]
            if all(arm["status"] in ("healthy", "degraded") for arm in arms):
                return
        time.sleep(0.5)
    raise SystemExit("the gateway did not come up")


@contextlib.contextmanager
def closing_connection(port: int) -> Iterator[http.client.HTTPConnection]:
    """One kept connection of the standard library's client, whose own cost is small beside what is measured."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        yield connection
    finally:
        connection.close()


def through_gateway(
    connection: http.client.HTTPConnection, window: FloatArray
) -> Callable[[], http.client.HTTPResponse]:
    token = mint_token(
        read_secret_file(development_secret()),
        subject="benchmark",
        scopes=["predict"],
        issuer="sluice",
        audience="sluice",
        lifetime_s=3600,
        now=time.time(),
    )
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
    body = window.tobytes()

    def call() -> http.client.HTTPResponse:
        connection.request("POST", "/ray-serve/predict", body=body, headers=headers)
        response = connection.getresponse()
        response.read()
        return response

    return call


def expect_ray_serve(connection: http.client.HTTPConnection, call: Callable[[], http.client.HTTPResponse]) -> None:
    """Warm both sides up, and make sure that what is measured is Ray Serve and not a fallback."""
    for _ in range(50):
        response = call()
        if response.status != http.HTTPStatus.OK or response.headers["X-Served-By"] != "ray_serve":
            raise SystemExit(f"not served by Ray Serve: {response.status} {dict(response.headers)}")


def one_round(engine: Callable[[], object], served: Callable[[], object], count: int) -> dict[str, float]:
    hot_ms = [timed_ms(engine) for _ in range(count)]
    for _ in range(count):
        served()  # the processes that were idle meanwhile find their pace again
    in_turn = [(timed_ms(engine), timed_ms(served)) for _ in range(count)]
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


def report(rounds: list[dict[str, float]]) -> None:
    summary: dict[str, object] = {"rounds": rounds}
    for engine in ("engine_in_turn_ms", "engine_hot_ms"):
        added = [row["served_ms"] - row[engine] for row in rounds]
        figures = {"median": statistics.median(added), "min": min(added), "max": max(added)}
        summary[f"added_over_{engine}"] = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
