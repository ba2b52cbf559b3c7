"""What scenarios run on, and the loads they are put under."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.faults.laboratory import Laboratory, stub_application
from tests.faults.scenario import PROBES, Floor
from tests.integration.open_loop import Stream

PREDICT = "/ray-serve/predict"
RAW = {"Content-Type": "application/octet-stream"}
TENANTS = ("desk-a", "desk-b")
FRESH_SHARE = 0.3


def body(windows: int = 1, seed: int = 3) -> bytes:
    """Raw float32[B,F,T] as the shipped model expects them: scaled features."""
    return np.random.default_rng(seed).normal(size=(windows, 50, 60)).astype("<f4").tobytes()


def desks(rate_rps: float, *, windows: int = 1, **headers: str) -> Callable[[Floor], list[Stream]]:
    """Two tenants that share the rate, on kept and on new connections, and both probes of health all the while."""

    def streams(floor: Floor) -> list[Stream]:
        asking = [
            Stream(
                name=tenant,
                port=floor.gateway.port,
                path=PREDICT,
                headers={**RAW, **headers, **floor.gateway.headers("predict", subject=tenant)},
                rate_rps=rate_rps / len(TENANTS),
                body_hex=body(windows).hex(),
                fresh_share=FRESH_SHARE,
            )
            for tenant in TENANTS
        ]
        return asking + probes(floor)

    return streams


def probes(floor: Floor, rate_rps: float = 5.0) -> list[Stream]:
    return [
        Stream(probe, floor.gateway.port, f"/health/{probe}", {}, rate_rps, method="GET", connections=1, even=True)
        for probe in PROBES
    ]


def ray(
    *, engine: str = "sleep", replicas: int = 2, legacy: str = "off", settings: dict[str, str] | None = None, **how: Any
) -> Callable[[Laboratory], Floor]:
    """Ray Serve with a stub for a model, alone or with a legacy of the same engine behind it."""

    def stage(lab: Laboratory) -> Floor:
        lab.deploy(stub_application(engine=engine, replicas=replicas))
        return serving(lab, lab.ray_environment, legacy=legacy, engine=engine, settings=settings, **how)

    return stage


def serving(
    lab: Laboratory,
    environment: dict[str, str],
    *,
    legacy: str = "off",
    engine: str = "sleep",
    settings: dict[str, str] | None = None,
    wait_for: Sequence[str] | None = None,
    **how: Any,
) -> Floor:
    """A gateway of which every arm answers."""
    wanted = {**environment, "GATEWAY_LEGACY": legacy, "GATEWAY_ENGINE": engine, **(settings or {})}
    gateway = lab.gateway(wanted, **how)
    arms = [*(["ray_serve"] if "RAY_ADDRESS" in environment else []), *([] if legacy == "off" else ["legacy"])]
    for arm in arms if wait_for is None else wait_for:
        gateway.wait_for(arm, 40)
    return Floor(lab, gateway)
