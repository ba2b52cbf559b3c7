"""What a shadow of every request costs the callers of a whole Sluice: gateway, Ray Serve and the shipped model.

One gateway with both arms. At `--share 0` legacy answers and Ray Serve is the shadow, as before a migration; at
`--share 1` Ray Serve answers and legacy is the shadow, as at its last step. In every round the same requests are due
at the same times without the shadow and with it, in an order that turns from round to round. At the default rate the
machine has capacity left: a shadow doubles the model's work, and where none is left it rests and counts what it left
out.

    python -m benchmarks.shadow_live [--share 0] [--rounds 5] [--seconds 20] [--rate 40]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from statistics import median
from typing import NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from app.client import GatewayClient
from benchmarks.open_loop import open_loop, poisson_arrivals
from benchmarks.peers.catalogue import ROOT
from benchmarks.processes import NotUp
from benchmarks.request import HOST, Measured, Request
from benchmarks.rounds import SHIPPED
from benchmarks.suite import all_models, all_systems, make_bench
from benchmarks.systems import Running

_CONNECTIONS = 32
_WARM_UP_REQUESTS = 200
_SETTLE_S = 1.0  # a change of the rollout reaches the worker within it
_SHADOWED = "gateway_shadow_requests_total"


class Load(NamedTuple):
    """One load: the callers' figures, and what became of the requests that were shadowed meanwhile."""

    measured: Measured
    shadowed: dict[str, int]

    @property
    def p99_ms(self) -> float:
        p99_ms = self.measured.latency_ms["p99"]
        if p99_ms is None or self.measured.failed:
            raise NotUp(f"not every request was answered: {self.measured.failed}")
        return p99_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.0, choices=(0.0, 1.0))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=40.0)
    arguments = parser.parse_args()
    bench = make_bench(
        {"sluice": all_systems()["sluice"]}, {SHIPPED: all_models("torch")[SHIPPED]}, ROOT / ".bench" / "runs", print
    )
    with bench.running("sluice", SHIPPED) as up, _operator(up) as gateway:
        live = Live(up, gateway, up.request("binary", bench.windows(1)), arguments.share)
        live.warm_up()
        rounds = [live.measure_round(n, arguments.seconds, arguments.rate) for n in range(arguments.rounds)]
    print(json.dumps(summarise(rounds), indent=2))


def _operator(up: Running) -> GatewayClient:
    return GatewayClient(f"http://{HOST}:{up.port}", up.operator_token)


def summarise(rounds: list[tuple[Load, Load]]) -> dict[str, object]:
    """Each round's figures without and with the shadow, and the median of the rounds' ratios."""
    return {
        "p50_ms": [[_rounded(load.measured.latency_ms["p50"]) for load in pair] for pair in rounds],
        "p99_ms": [[_rounded(load.p99_ms) for load in pair] for pair in rounds],
        "median_p99_ratio": _rounded(median(shadowed.p99_ms / without.p99_ms for without, shadowed in rounds)),
        "requests": [[load.measured.answered for load in pair] for pair in rounds],
        "shadowed": [shadowed.shadowed for _, shadowed in rounds],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


class Live:
    """A running Sluice whose shadow is put on and off.

    Args:
        up: The system.
        gateway: Its operator.
        request: What is asked.
        share: Of the callers who are on Ray Serve.
    """

    def __init__(self, up: Running, gateway: GatewayClient, request: Request, share: float) -> None:
        self._up = up
        self._gateway = gateway
        self._request = request
        self._share = share

    def warm_up(self) -> None:
        """Ask both arms, with the shadow and without."""
        for shadowed in (False, True):
            self._put(shadowed)
            open_loop(self._request, np.arange(_WARM_UP_REQUESTS) / 100, connections=_CONNECTIONS)

    def measure_round(self, number: int, seconds: float, rate_rps: float) -> tuple[Load, Load]:
        """The load without the shadow and the load with it, of the same requests at the same times."""
        due_s = _SETTLE_S + poisson_arrivals(rate_rps, seconds, seed=number)
        order = (False, True) if number % 2 == 0 else (True, False)
        loads = {shadowed: self._measure(shadowed, due_s) for shadowed in order}
        return loads[False], loads[True]

    def _measure(self, shadowed: bool, due_s: np.ndarray) -> Load:
        self._put(shadowed)
        before = self._shadowed()
        measured = open_loop(self._request, due_s, connections=_CONNECTIONS)
        return Load(measured, dict(self._shadowed() - before))

    def _put(self, shadowed: bool) -> None:
        """Share by hand ends whatever plan was in force; the plan stays at its only step."""
        self._gateway.set_fraction(self._share)
        if shadowed:
            step = {"share": self._share, "hold_s": 86_400}
            plan = {"name": "shadow", "steps": [step], "guards": [], "shadow": 1.0}
            self._gateway.move_rollout("start", {"plan": plan})

    def _shadowed(self) -> Counter[str]:
        headers = {"Authorization": f"Bearer {self._up.operator_token}"}
        answer = httpx.get(f"http://{HOST}:{self._up.port}/metrics", headers=headers, trust_env=False, timeout=10.0)
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
        return Counter({s.labels["outcome"]: int(s.value) for s in samples if s.name == _SHADOWED})


if __name__ == "__main__":
    main()
