"""Rules by which a canary may be rolled back, all shown the same counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, sqrt
from statistics import NormalDist
from typing import Protocol

import numpy as np

from app.rollout.evidence import LATENCY_BOUNDS_S, Evidence
from app.rollout.judge import Judge
from app.rollout.plan import Guard
from app.rollout.wager import Tally

_NORMAL = NormalDist()
_BUCKETS = range(len(LATENCY_BOUNDS_S) + 1)

Reader = Callable[[Evidence], Tally]


class Rule(Protocol):
    def see(self, batch: Evidence) -> bool:
        """Take one look's counts; whether the canary is to be rolled back."""
        ...


class ByJudge:
    """Ours."""

    def __init__(self, guards: Sequence[Guard], alpha: float) -> None:
        self._judge = Judge(guards, alpha)

    def see(self, batch: Evidence) -> bool:
        self._judge.see(batch)
        return self._judge.breached


class ByProportions:
    """One-sided two-proportion z-tests, pooled; each of several signals with its part of alpha.

    Args:
        signals: What is compared.
        alpha: Chance of a false alarm, of one look.
        horizon: Canary outcomes of the first signal at which it looks, once; None to look every time.
    """

    def __init__(self, signals: Sequence[Reader], alpha: float, horizon: int | None) -> None:
        self._signals = [(reader, Tally()) for reader in signals]
        self._critical = _NORMAL.inv_cdf(1 - alpha / len(signals))
        self._horizon = horizon
        self._done = False

    def see(self, batch: Evidence) -> bool:
        for reader, tally in self._signals:
            tally.add(reader(batch))
        if self._done or (self._horizon is not None and self._signals[0][1].canary < self._horizon):
            return False
        self._done = self._horizon is not None
        return any(_z(tally) > self._critical for _, tally in self._signals)


class ByFlagger:
    """Flagger's: each minute the canary's success rate and p99 of that minute are held against fixed thresholds.

    A minute out of range is a failed check; failed checks add up, and from `threshold` of them on the next minute rolls
    back (`analysis.threshold`, https://docs.flagger.app/usage/how-it-works, and `advanceCanary` in its scheduler.go).

    Args:
        success: Least share of requests that succeed; 0.99 in its documentation.
        p99_s: Longest p99; 0.5 in its documentation.
        minute_looks: Looks that make a minute.
    """

    def __init__(self, minute_looks: int, *, success: float = 0.99, p99_s: float = 0.5, threshold: int = 5) -> None:
        self._minute_looks, self._success, self._p99_s, self._threshold = minute_looks, success, p99_s, threshold
        self._looks = self._failed = 0
        self._minute = Evidence()

    def see(self, batch: Evidence) -> bool:
        self._minute.add(batch)
        self._looks += 1
        if self._looks % self._minute_looks:
            return False
        if self._failed >= self._threshold:
            return True
        self._failed += self._is_out_of_range()
        self._minute = Evidence()
        return False

    def _is_out_of_range(self) -> bool:
        n = self._minute["canary_requests"]
        latency = np.cumsum([self._minute[f"canary_latency_{i}"] for i in _BUCKETS])
        if n == 0 or latency[-1] == 0:
            return n > 0
        p99_s = (*LATENCY_BOUNDS_S, np.inf)[int(np.searchsorted(latency, 0.99 * latency[-1]))]
        return bool(1 - self._minute["canary_errors"] / n < self._success or p99_s > self._p99_s)


def horizon(stable: float, canary: float, share: float, alpha: float, power: float = 0.9) -> int:
    """Canary outcomes at which a z-test finds this difference with this power (normal approximation).

    Args:
        stable: Rate to expect, 0..1.
        canary: Rate to find.
        share: The canary's part of all outcomes.
        alpha: One-sided level of the test.
    """
    pooled = share * canary + (1 - share) * stable
    of_level = _NORMAL.inv_cdf(1 - alpha) * sqrt(pooled * (1 - pooled) / (1 - share))
    of_power = _NORMAL.inv_cdf(power) * sqrt(canary * (1 - canary) + stable * (1 - stable) * share / (1 - share))
    return ceil(((of_level + of_power) / (canary - stable)) ** 2)


def failures(batch: Evidence) -> Tally:
    names = ("stable_errors", "stable_requests", "canary_errors", "canary_requests")
    return Tally(*(batch[name] for name in names))


def invalids(batch: Evidence) -> Tally:
    names = ("stable_invalid", "stable_requests", "canary_invalid", "canary_requests")
    return Tally(*(batch[name] for name in names))


def slower_than(limit: int, batch: Evidence) -> Tally:
    """Answers beyond a latency bucket."""
    stable, canary = ([batch[f"{side}_latency_{i}"] for i in _BUCKETS] for side in ("stable", "canary"))
    return Tally(sum(stable[limit + 1 :]), sum(stable), sum(canary[limit + 1 :]), sum(canary))


def of_class(chosen: int, batch: Evidence) -> Tally:
    """Windows for which an arm chose the class, as if the arms had seen different ones."""
    stable = sum(batch[f"shadow_pair_{chosen}_{i}"] for i in range(3))
    canary = sum(batch[f"shadow_pair_{i}_{chosen}"] for i in range(3))
    return Tally(stable, batch["shadow_windows"], canary, batch["shadow_windows"])


def _z(tally: Tally) -> float:
    if not tally.stable or not tally.canary:
        return 0.0
    pooled = (tally.stable_bad + tally.canary_bad) / (tally.stable + tally.canary)
    variance = pooled * (1 - pooled) * (1 / tally.stable + 1 / tally.canary)
    return (tally.canary_bad / tally.canary - tally.stable_bad / tally.stable) / sqrt(variance) if variance else 0.0
