"""Ten times the load that it can carry: what is answered is as much and as quick as ever, and the rest is told so.

Capacity is set by a model that sleeps 10 ms for each window: 100 requests of one window per second.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.integration.open_loop import Load, Plan, Stream, offer, percentile_ms
from tests.integration.processes import GatewayProcess
from tests.integration.sleeper import windows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

CAPACITY_RPS = 100
CONNECTIONS = 200
DEADLINE_MS = 2000
HEALTH_PATHS = ("/health/live", "/health/ready", "/health")
RAW = {"Content-Type": "application/octet-stream"}


@dataclass
class Asked:
    """What one patient client was told, question by question."""

    statuses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@contextmanager
def asking(gateway: GatewayProcess, ask: Callable[[httpx.Client], httpx.Response]) -> Iterator[Asked]:
    """Ask the same again and again, from a thread, a tenth of a second after each answer."""
    asked, ended = Asked(), threading.Event()

    def ask_until_the_end() -> None:
        headers = gateway.headers("predict", subject="quiet")
        with httpx.Client(base_url=gateway.url, headers=headers, timeout=3.0, trust_env=False) as http:
            while not ended.wait(0.1):
                sent = time.monotonic()
                try:
                    asked.statuses.append(ask(http).status_code)
                except httpx.HTTPError:
                    asked.statuses.append(0)
                asked.seconds.append(time.monotonic() - sent)

    thread = threading.Thread(target=ask_until_the_end)
    thread.start()
    try:
        yield asked
    finally:
        ended.set()
        thread.join()


@contextmanager
def probing(gateway: GatewayProcess) -> Iterator[dict[str, Asked]]:
    """Ask for the service's health all the while."""
    live, ready, health = (asking(gateway, lambda http, path=path: http.get(path)) for path in HEALTH_PATHS)
    with live as a, ready as b, health as c:
        yield dict(zip(HEALTH_PATHS, (a, b, c), strict=True))


def load_of(gateway: GatewayProcess, times_capacity: float, seconds: float) -> Load:
    flood = Stream(
        name="flood",
        port=int(gateway.url.rpartition(":")[2]),
        path="/ray-serve/predict",
        headers={**RAW, **gateway.headers("predict", subject="flood")},
        body_hex=windows(1e3 / CAPACITY_RPS).hex(),
        rate_rps=times_capacity * CAPACITY_RPS,
        connections=CONNECTIONS,
    )
    return offer(Plan([flood], seconds, core=max(os.sched_getaffinity(0))))


HEAD = (
    f"{'offered':>8} {'sent':>6} {'200/s':>7} {'p50':>7} {'p99':>7} {'503':>6} {'p50':>7} {'p99':>7}"
    f" {'sent late p99':>14} {'health p99':>11}   ms"
)


def row(times: float, load: Load, health: dict[str, Asked]) -> str:
    late_ms = percentile_ms((result.late_s for result in load.results), 99)
    health_ms = percentile_ms((s for asked in health.values() for s in asked.seconds), 99)
    return (
        f"{times:>7g}x {len(load.results):>6} {load.goodput_rps:>7.1f}"
        f" {load.answered_ms(50):>7.1f} {load.answered_ms(99):>7.1f} {len(load.refused):>6}"
        f" {load.refused_ms(50):>7.1f} {load.refused_ms(99):>7.1f}"
        f" {late_ms:>14.1f} {health_ms:>11.1f}   {dict(load.statuses)}"
    )


def measure(gateway: GatewayProcess, times: float, seconds: float) -> Load:
    """Offer a multiple of the capacity for so long; health answers all the while, refusals say when to come."""
    with probing(gateway) as health:
        load = load_of(gateway, times, seconds)
    print(row(times, load, health))
    for path, asked in health.items():
        assert set(asked.statuses) == {200}, path
    assert all(result.retry_after and int(result.retry_after) >= 1 for result in load.refused)
    # One in a hundred may meet its deadline instead: a machine may stand still for a while.
    assert load.statuses[200] + load.statuses[503] >= 0.99 * len(load.results), load.statuses
    return load


def test_a_flood_costs_neither_goodput_nor_latency_nor_another_client_its_answers(gateway: GatewayProcess) -> None:
    """Wide bounds, for a busy machine and few seconds; without admission, a third of the goodput is left."""
    print(f"\n{HEAD}")
    near_capacity = measure(gateway, 0.9, 2.0)
    with asking(gateway, lambda http: http.post("/ray-serve/predict", content=windows(10), headers=RAW)) as quiet:
        flooded = measure(gateway, 10, 3.0)
    print(f"a quiet client meanwhile: {len(quiet.seconds)} answers, {1e3 * max(quiet.seconds):.0f} ms at most")
    assert set(quiet.statuses) == {200}
    assert flooded.goodput_rps > 0.7 * near_capacity.goodput_rps
    assert flooded.answered_ms(90) < DEADLINE_MS / 2
    assert flooded.refused_ms(50) < 100


@pytest.mark.slow
def test_goodput_and_latency_hold_at_twice_and_ten_times_the_capacity(gateway: GatewayProcess) -> None:
    print(f"\n{HEAD}")
    half, once, twice, ten = (measure(gateway, times, 6.0) for times in (0.5, 1, 2, 10))
    peak_rps = max(load.goodput_rps for load in (half, once, twice, ten))
    assert not half.refused
    assert min(twice.goodput_rps, ten.goodput_rps) > 0.9 * peak_rps
    assert ten.answered_ms(99) < 1.5 * twice.answered_ms(99)
    assert twice.refused_ms(50) < 20
    assert ten.refused_ms(50) < 20
