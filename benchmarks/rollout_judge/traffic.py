"""Traffic of two arms, drawn as the counts that a gateway would have made of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import erf, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.rollout.evidence import LATENCY_BOUNDS_S, Evidence

Rng = np.random.Generator
Floats = NDArray[np.float64]

_MEDIAN_S, _SPREAD = 0.020, 0.4


def lognormal_buckets(median_s: float = _MEDIAN_S, spread: float = _SPREAD) -> Floats:
    """Chance of each latency bucket where the logarithm of latency is normal with this deviation."""
    below = [0.5 * (1 + erf(log(bound / median_s) / spread / sqrt(2))) for bound in LATENCY_BOUNDS_S]
    return np.diff([0.0, *below, 1.0])


def paired_classes(agreement: float, bias: float) -> Floats:
    """Chances of (stable's class, canary's class): the same with chance `agreement`, else drawn anew.

    Args:
        agreement: 0..1.
        bias: Share of windows, 0..1, for which the canary chooses class 2 whatever it saw.
    """
    mix = np.array([0.3, 0.4, 0.3])
    joint = agreement * np.diag(mix) + (1 - agreement) * np.outer(mix, mix)
    return (1 - bias) * joint + bias * np.outer(mix, [0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Behaviour:
    """How one arm answers: chance of an error, of an invalid output besides, and of each latency bucket."""

    errors: float = 0.01
    invalid: float = 0.0
    latency: Floats = field(default_factory=lognormal_buckets)


@dataclass(frozen=True)
class World:
    """Two arms and what is asked of them.

    Attributes:
        classes: Joint chances of the arms' classes, float[3, 3], rows are the stable arm's.
        shadow: Share of requests whose window both arms answer.
        rate: Requests per second.
    """

    stable: Behaviour = Behaviour()
    canary: Behaviour = Behaviour()
    classes: Floats = field(default_factory=lambda: paired_classes(0.9, 0.0))
    shadow: float = 0.0
    rate: float = 400.0

    def draw(self, rng: Rng, share: float, seconds: float) -> Evidence:
        """Independent requests of some seconds, as many as a Poisson process has."""
        counts: dict[str, int] = {}
        for side, arm, part in (("stable", self.stable, 1 - share), ("canary", self.canary, share)):
            _count_answers(counts, rng, side, arm, int(rng.poisson(self.rate * part * seconds)))
        if self.shadow:
            self._count_shadow(counts, rng, int(rng.poisson(self.rate * self.shadow * seconds)))
        return Evidence(counts)

    def _count_shadow(self, counts: dict[str, int], rng: Rng, n: int) -> None:
        pairs = rng.multinomial(n, self.classes.ravel()).reshape(3, 3)
        counts |= {f"shadow_pair_{i}_{j}": int(pairs[i, j]) for i in range(3) for j in range(3)}
        counts |= {"shadow_windows": n, "shadow_disagreements": n - int(np.trace(pairs))}


def _count_answers(counts: dict[str, int], rng: Rng, side: str, arm: Behaviour, n: int) -> None:
    invalid = int(rng.binomial(n, arm.invalid))
    errors = invalid + int(rng.binomial(n - invalid, arm.errors))
    counts |= {f"{side}_requests": n, f"{side}_errors": errors, f"{side}_invalid": invalid}
    latency = rng.multinomial(n - errors, arm.latency)
    counts |= {f"{side}_latency_{i}": int(latency[i]) for i in np.flatnonzero(latency)}


class Callers:
    """A world whose callers differ, each of them sticking to its side: some fail often, some ask much.

    Args:
        n: Callers.
        spread: Of the callers' error rates, a Beta distribution with the mean of `errors`: the correlation of two
            requests of one caller, 0..1.
        cap: Outcomes of one caller that count within one look; None for all.
    """

    def __init__(self, rng: Rng, n: int, *, spread: float, errors: float = 0.01, cap: int | None = None) -> None:
        concentration = 1 / spread - 1
        self._errors = rng.beta(errors * concentration, (1 - errors) * concentration, n)
        self._positions = rng.random(n)
        weights = rng.lognormal(0.0, 1.0, n)
        self._weights = weights / weights.sum()
        self._cap = cap
        self._latency = lognormal_buckets()

    def draw(self, rng: Rng, share: float, seconds: float, rate: float = 400.0) -> Evidence:
        """As `World.draw`, with sticky callers."""
        asked = rng.poisson(self._weights * rate * seconds)
        failed = rng.binomial(asked, self._errors)
        if self._cap is not None:
            counted = np.minimum(asked, self._cap)
            asked, failed = counted, rng.hypergeometric(failed, asked - failed, counted)
        on_canary = self._positions < share
        counts: dict[str, int] = {}
        for side, members in (("stable", ~on_canary), ("canary", on_canary)):
            n, errors = int(asked[members].sum()), int(failed[members].sum())
            counts |= {f"{side}_requests": n, f"{side}_errors": errors}
            latency = rng.multinomial(n - errors, self._latency)
            counts |= {f"{side}_latency_{i}": int(latency[i]) for i in np.flatnonzero(latency)}
        return Evidence(counts)


def faulty(**changes: Any) -> World:
    """The usual world, but for these fields of the canary."""
    return World(canary=replace(Behaviour(), **changes))
