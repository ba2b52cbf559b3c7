"""What a shadow of every request costs the caller: p99 with and without it, in rounds that take turns.

Two arms, each a coalescer before a constant that comes two milliseconds after it was asked for. Requests for one
window are due at even times, and latency counts from when a request was due. The shadow is offered each answer after
it was taken, as the request path does. There is no HTTP here: what the rest of the gateway costs is the same with
and without a shadow, and would only hide the difference.

    python -m benchmarks.shadow [--rounds 5] [--seconds 10] [--rate 300]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from collections import Counter
from statistics import median
from typing import NamedTuple

import numpy as np
import uvloop

from app.backends.base import Arm, Call
from app.observability.loop_lag import LoopLag
from app.rollout.compare import Floats
from app.rollout.dispatch import Served
from app.rollout.evidence import Evidence, Side
from app.rollout.shadow import GATHER_S, Outcome, Setup, Shadow
from benchmarks.request_path import ConstantBackend
from serve_app.contract import N_FEATURES, N_STEPS, Options

_STABLE, _CANARY = Arm("legacy"), Arm("ray_serve")
_WINDOW = np.zeros((1, N_FEATURES, N_STEPS), np.float32)


class NamedBackend(ConstantBackend):
    """A constant arm of this name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Outcomes:
    """Counts what became of the requests chosen."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, outcome: Outcome) -> None:
        self.counts[outcome] += 1

    def observe_latency(self, side: Side, seconds: float) -> None: ...

    def observe_distances(self, distances: Floats) -> None: ...

    def observe_gaps(self, gaps: Floats) -> None: ...


class Round(NamedTuple):
    """One round: the callers' p99, and what became of the requests that were shadowed."""

    p99_ms: float
    outcomes: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=300.0)
    arguments = parser.parse_args()
    print(json.dumps(uvloop.run(measure(arguments.rounds, arguments.seconds, arguments.rate)), indent=2))


async def measure(rounds: int, seconds: float, rate_rps: float) -> dict[str, object]:
    """Rounds without and with the shadow, taking turns, and the median of their ratios."""
    gc.collect()
    gc.freeze()  # as the gateway does once it is warm: a full collection with torch imported is a p99 of its own
    pairs = []
    for _ in range(rounds):
        without = await measure_round(0.0, seconds, rate_rps)
        pairs.append((without, await measure_round(1.0, seconds, rate_rps)))
    return {
        "p99_ms": [[round(without.p99_ms, 3), round(shadowed.p99_ms, 3)] for without, shadowed in pairs],
        "median_ratio": round(median(shadowed.p99_ms / without.p99_ms for without, shadowed in pairs), 3),
        "shadowed": [shadowed.outcomes for _, shadowed in pairs],
    }


async def measure_round(share: float, seconds: float, rate_rps: float) -> Round:
    """One open loop against the stable arm, with this share shadowed by the canary."""
    stable, canary, outcomes = NamedBackend("legacy"), NamedBackend("ray_serve"), Outcomes()
    shadow = Shadow({"legacy": stable, "ray_serve": canary}, is_ready=lambda arm: True, books=outcomes)
    shadow.configure(Setup(share, _STABLE, _CANARY, Evidence()))
    lag = LoopLag(shadow.observe_lag, clock=time.monotonic)
    await lag.start()
    begin = time.monotonic()
    dues = [begin + i / rate_rps for i in range(max(1, int(seconds * rate_rps)))]
    latencies_ms = await asyncio.gather(*(_request(stable, shadow, due) for due in dues))
    await asyncio.sleep(2 * GATHER_S if share else 0.0)  # for the last group
    for service in (lag, shadow, stable, canary):
        await service.stop()
    return Round(float(np.percentile(latencies_ms, 99)), dict(outcomes.counts))


async def _request(backend: NamedBackend, shadow: Shadow, due: float) -> float:
    """Milliseconds from when the request was due until its answer was there."""
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    call = Call(_WINDOW, Options(), due + 2.0, os.urandom(16).hex(), "0" * 16)
    answer = await backend.predict(call)
    latency_ms = 1e3 * (time.monotonic() - due)
    shadow.offer(call, Served(answer, _STABLE), "stable")
    return latency_ms


if __name__ == "__main__":
    main()
