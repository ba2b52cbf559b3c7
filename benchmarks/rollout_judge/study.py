"""Many runs of canaries that keep their guards, over whole plans, and of ones with a fault, until they are caught."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import numpy as np

from app.rollout import moves
from app.rollout.controller import Controller
from app.rollout.evidence import LATENCY_BOUNDS_S, Evidence
from app.rollout.gathering import LocalPool
from app.rollout.lease import LoneLease
from app.rollout.moves import By
from app.rollout.plan import Guard, Plan
from app.rollout.record import Record
from app.rollout.rollout import Rollout
from app.rollout.state import MemoryStore
from benchmarks.rollout_judge.rules import (
    ByFlagger,
    ByJudge,
    ByProportions,
    Reader,
    Rule,
    failures,
    horizon,
    invalids,
    of_class,
    slower_than,
)
from benchmarks.rollout_judge.traffic import Behaviour, Callers, Rng, World, faulty, lognormal_buckets, paired_classes

ALPHA = Plan().alpha
LOOK_S = 2.0
# The default ones, but for the time that the canary may take longer: the default allowance is the way to Ray Serve, as
# long as the answers here take, and would forgive half as much again.
GUARDS = (
    Guard(signal="errors", ratio=1.0, slack=0.002),
    Guard(signal="invalid", ratio=0.0, slack=0.001),
    Guard(signal="slow", ratio=1.25, slack=0.01, stretch=1.2, allowance_s=0.005),
)
SHADOW_GUARDS = (
    Guard(signal="disagreement", ratio=0, slack=0.15),
    Guard(signal="class_mix", ratio=1.0, slack=0.02),
)

_PLAN_LIMIT_S = 3600.0  # of a plan that needs 300 s, and longer for its samples where few callers are drawn
_FAULT_SHARE = 0.05
_FAULT_LOOKS = 900  # half an hour
_P90 = int(np.searchsorted(LATENCY_BOUNDS_S, 0.020 * np.exp(0.4 * 1.2816)))

Draw = Callable[[Rng, float, float], Evidence]
MakeWorld = Callable[[Rng], Draw]
MakeRules = Callable[[], dict[str, Rule]]


def _always(world: World, rng: Rng) -> Draw:
    return world.draw


def _callers(rng: Rng, *, n: int, spread: float, cap: int | None = None) -> Draw:
    return Callers(rng, n, spread=spread, cap=cap).draw


def _minute() -> int:
    return round(60 / LOOK_S)


def _all_rules() -> dict[str, Rule]:
    signals: list[Reader] = [failures, invalids, partial(slower_than, _P90)]
    at = horizon(0.01, 0.03, _FAULT_SHARE, ALPHA / len(signals))
    return {
        "judge": ByJudge(GUARDS, ALPHA),
        "z-test, once at its horizon": ByProportions(signals, ALPHA, at),
        "z-test, at every look": ByProportions(signals, ALPHA, None),
        "Flagger, 99 % and 500 ms": ByFlagger(_minute()),
        "Flagger, 98 % and 75 ms": ByFlagger(_minute(), success=0.98, p99_s=0.075),
    }


@dataclass(frozen=True)
class Kept:
    """Canaries that keep every guard, through the steps of the default plan: the controller's own, on a moved clock."""

    title: str
    world: MakeWorld
    runs: int
    guards: Sequence[Guard] = GUARDS
    shadow: float = 0.0
    look_s: float = LOOK_S

    def run(self, seed: int) -> dict[str, bool]:
        """Whether it is rolled back."""
        return {"judge": asyncio.run(self._is_rolled_back(np.random.default_rng(seed)))}

    async def _is_rolled_back(self, rng: Rng) -> bool:
        draw, pool, store, now = self.world(rng), LocalPool(), MemoryStore(), 0.0
        rollout = Rollout(store, initial=Record(share=0.0, changed_at=now, changed_by="settings"))
        controller = Controller(rollout, pool, LoneLease(), store, wall_clock=lambda: now)
        plan = Plan(guards=tuple(self.guards), alpha=ALPHA, shadow=self.shadow)
        await rollout.change(lambda record: moves.start(record, plan, "run", By("operator", now)), "start")
        while (epoch := rollout.record.epoch) is not None and now < _PLAN_LIMIT_S:
            now += self.look_s
            await pool.add(epoch, draw(rng, rollout.record.share, self.look_s))
            await controller.tick()
        assert rollout.record.run is not None, "it was started"
        return rollout.record.run.phase == "rolled_back"


@dataclass(frozen=True)
class Fault:
    """Canaries with a fault from the start, at a share of 5 % that stays, for half an hour at most."""

    title: str
    world: World
    rules: MakeRules
    counted: str = "canary_requests"
    runs: int = 200

    def run(self, seed: int) -> dict[str, int | None]:
        """How many of the canary's outcomes each rule needed."""
        rng = np.random.default_rng(seed)
        waiting, caught, n = self.rules(), dict[str, int | None](), 0
        names = list(waiting)
        for _ in range(_FAULT_LOOKS):
            batch = self.world.draw(rng, _FAULT_SHARE, LOOK_S)
            n += batch[self.counted]
            for name in [name for name, rule in waiting.items() if rule.see(batch)]:
                caught[name] = n
                del waiting[name]
            if not waiting:
                break
        return {name: caught.get(name) for name in names}


def _against(signal: Reader, stable: float, canary: float, share: float = _FAULT_SHARE, **guards: Any) -> MakeRules:
    at = horizon(stable, canary, share, ALPHA)
    return partial(_rules_for, signal, at, **guards)


def _rules_for(signal: Reader, at: int, guards: Sequence[Guard] = GUARDS) -> dict[str, Rule]:
    return {
        "judge": ByJudge(guards, ALPHA),
        "z-test, once at its horizon": ByProportions([signal], ALPHA, at),
        "Flagger, 99 % and 500 ms": ByFlagger(_minute()),
        "Flagger, 98 % and 75 ms": ByFlagger(_minute(), success=0.98, p99_s=0.075),
    }


def kept_studies(runs: int) -> list[Kept]:
    few = max(1, runs // 10)
    at_bound = Behaviour(errors=0.012)
    at_bound_invalid = Behaviour(errors=0.009, invalid=0.001)
    return [
        Kept("A/A: both arms the same", partial(_always, World()), runs),
        Kept("A/A, looked at each 0.25 s", partial(_always, World()), few // 4 or 1, look_s=0.25),
        Kept("errors as the guard just allows", partial(_always, World(canary=at_bound)), few),
        Kept("invalid as the guard just allows", partial(_always, World(canary=at_bound_invalid)), few),
        Kept("A/A in the shadow", partial(_always, World(shadow=0.1)), few, guards=SHADOW_GUARDS, shadow=0.1),
        *(_with_callers(n, spread, None, few) for n, spread in ((2000, 0.003), (2000, 0.03), (200, 0.03), (200, 0.3))),
        *(_with_callers(200, spread, 1, few) for spread in (0.03, 0.3)),
    ]


def _with_callers(n: int, spread: float, cap: int | None, runs: int) -> Kept:
    capped = f", {cap} outcome of a caller per look" if cap else ""
    title = f"A/A, {n:,} callers of unlike error rates, correlation {spread:g}{capped}"
    return Kept(title, partial(_callers, n=n, spread=spread, cap=cap), runs)


def fault_studies(runs: int) -> list[Fault]:
    slow = lognormal_buckets(0.030)
    biased = World(classes=paired_classes(0.9, 0.1), shadow=0.1)
    p90, p90_slow = (1 - lognormal_buckets(m)[: _P90 + 1].sum() for m in (0.020, 0.030))
    return [
        Fault("none: both arms the same", World(), _all_rules, runs=runs),
        Fault("errors 1 % → 3 %", faulty(errors=0.03), _against(failures, 0.01, 0.03), runs=runs),
        Fault("latency × 1.5", faulty(latency=slow), _against(partial(slower_than, _P90), p90, p90_slow), runs=runs),
        Fault("NaN: 1 in 100 invalid", faulty(invalid=0.01), _against(invalids, 0.0, 0.01), runs=runs),
        Fault(
            "a class chosen 7 % more often (shadow)",
            biased,
            _against(partial(of_class, 2), 0.30, 0.37, share=0.5, guards=SHADOW_GUARDS),
            counted="shadow_windows",
            runs=runs,
        ),
    ]


def run_all(studies: Sequence[Kept | Fault], seed: int, processes: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Results by title, the same for the same seed on any number of processes."""
    results = {}
    with ProcessPoolExecutor(processes) as pool:
        for study in studies:
            seeds = range(seed, seed + study.runs)
            results[study.title] = list(pool.map(study.run, seeds, chunksize=max(1, study.runs // 50)))
            tell(study.title)
    return results


def summarise_kept(runs: Sequence[Mapping[str, bool]]) -> dict[str, dict[str, float]]:
    """False rollbacks of each rule, with Wilson's 95 % interval."""
    n = len(runs)
    return {name: {"runs": n, **_wilson(sum(run[name] for run in runs), n)} for name in runs[0]}


def summarise_fault(runs: Sequence[Mapping[str, int | None]]) -> dict[str, dict[str, float | None]]:
    """Runs in which each rule caught it, and outcomes until then; what is not caught counts as later than all."""
    return {name: _quantiles([run[name] for run in runs]) for name in runs[0]}


def _quantiles(caught: Sequence[int | None]) -> dict[str, float | None]:
    found = sorted(n for n in caught if n is not None)
    at = {name: int(q * (len(caught) - 1)) for name, q in (("median", 0.5), ("p90", 0.9))}
    return {"caught": len(found) / len(caught)} | {
        name: found[place] if place < len(found) else None for name, place in at.items()
    }


def _wilson(k: int, n: int, z: float = 1.96) -> dict[str, float]:
    centre, half = (k + z * z / 2) / (n + z * z), z * sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return {"rolled_back": k, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}
