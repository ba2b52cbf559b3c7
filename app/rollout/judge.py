"""Whether a canary keeps its guards: an always-valid sequential test, one for a whole rollout.

It may be looked at after every request. Over everything that it is ever shown, and over every change of the share, the
chance that it finds a breach of a guard that was kept is at most `alpha`, all guards together: each gets an equal part.

What is assumed: requests of an arm go wrong independently of each other, and how many come, of those seen at once, does
not depend on how they go. The rates may change with time as long as the guard is kept at every time, except while the
canary answers everybody: it is then judged by what the stable arm did before. Callers of which some always fail break
the first assumption; the decision record of the judge shows how far that bends the promise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log
from typing import Any, Protocol

from app.rollout.evidence import LATENCY_BOUNDS_S, N_CLASSES, Evidence
from app.rollout.plan import Guard, Signal
from app.rollout.wager import PairedBet, Pairs, RateBet, Tally, log_mean

# A guard's part of alpha that is kept for bounds on a stable arm that has gone silent.
_FOR_SILENCE = 0.1

# The stable arm's first answers, by whose percentiles `slow` is judged afterwards.
_TIMED_LESSONS = 200
_PERCENTILES = (50, 90, 99)
_N_BUCKETS = len(LATENCY_BOUNDS_S) + 1

_BAD = {
    "errors": "failed",
    "invalid": "had an invalid output",
    "disagreement": "were of another class than the stable arm's",
    "regression": "had an expected return too far from the stable arm's",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one guard.

    Attributes:
        signal: Which guard.
        breached: Whether it is, or ever was, beyond doubt broken.
        log10_evidence: Decimal logarithm of the e-value now: by what factor bets against the guard have grown.
        log10_threshold: At which it is breached.
        looked_at: Which part of the guard stands worst, "" where it has one part only.
        stable_bad: Bad outcomes of the stable arm, of `stable`.
        canary_bad: Bad outcomes of the canary, of `canary`.
        bound: Highest rate that the guard allows the canary, by the stable arm's rate so far; None before there is one.
        sentence: All of it for people.
    """

    signal: Signal
    breached: bool
    log10_evidence: float
    log10_threshold: float
    looked_at: str
    stable_bad: int
    stable: int
    canary_bad: int
    canary: int
    bound: float | None
    sentence: str

    @property
    def is_known(self) -> bool:
        """Whether anything was seen by which the guard could be judged."""
        return self.bound is not None and self.canary > 0


class Judge:
    """Judges a canary by the guards of its plan; pure, with no clock.

    Args:
        guards: At most one of each signal.
        alpha: Chance, 0..1, that any of the guards is found breached although all are kept.
    """

    def __init__(self, guards: Sequence[Guard], alpha: float) -> None:
        self._cases = [_Case(guard, alpha / len(guards)) for guard in guards]

    def see(self, batch: Evidence) -> None:
        """Take what was seen of both arms since the last time."""
        for case in self._cases:
            case.see(batch)

    @property
    def breached(self) -> bool:
        return any(case.breached for case in self._cases)

    def verdicts(self) -> list[Verdict]:
        """One for each guard, in their order."""
        return [case.verdict() for case in self._cases]

    def to_document(self) -> dict[str, Any]:
        """Everything that was learned, ready for JSON, whose numbers give it back exactly."""
        return {case.guard.signal: case.to_document() for case in self._cases}

    @classmethod
    def from_document(cls, guards: Sequence[Guard], alpha: float, document: dict[str, Any]) -> Judge:
        """The judge that wrote the document, of the same guards and alpha.

        Raises:
            KeyError, TypeError, ValueError: It is of other guards, or no judge's document.
        """
        judge = cls(guards, alpha)
        for case in judge._cases:
            case.load(document[case.guard.signal])
        return judge


class _Trial(Protocol):
    """Bets against every part of a guard; while it is kept all parts are, so the mean of their wealth is a bet too."""

    def see(self, batch: Evidence) -> None: ...

    def bets(self) -> Sequence[RateBet | PairedBet]:
        """One for each part; none before it is known what to look at."""
        ...

    def names(self) -> Sequence[str]:
        """What each looks at."""
        ...

    def to_document(self) -> dict[str, Any]: ...

    def load(self, document: dict[str, Any]) -> None: ...


class _Case:
    """One guard's trial, and whether it has ever been lost."""

    def __init__(self, guard: Guard, alpha: float) -> None:
        self.guard = guard
        self._trial = _open(guard, _FOR_SILENCE * alpha)
        self._threshold = -log(alpha * (1 - _FOR_SILENCE))
        self._log_evidence = 0.0
        self.breached = False

    def see(self, batch: Evidence) -> None:
        self._trial.see(batch)
        if bets := self._trial.bets():
            self._log_evidence = log_mean([bet.purse.log_wealth() for bet in bets])
            self.breached = self.breached or self._log_evidence >= self._threshold

    def verdict(self) -> Verdict:
        parts = zip(self._trial.names(), self._trial.bets(), strict=True)
        name, bet = max(parts, key=lambda part: part[1].purse.log_wealth(), default=("", None))
        seen = bet.seen() if bet else Tally()
        bound = _bound(self.guard, seen)
        return Verdict(
            signal=self.guard.signal,
            breached=self.breached,
            log10_evidence=self._log_evidence / log(10),
            log10_threshold=self._threshold / log(10),
            looked_at=name,
            stable_bad=seen.stable_bad,
            stable=seen.stable,
            canary_bad=seen.canary_bad,
            canary=seen.canary,
            bound=bound,
            sentence=self._sentence(name, seen, bound),
        )

    def _sentence(self, name: str, seen: Tally, bound: float | None) -> str:
        # Without a bet it is the stable arm that is waited for, whatever the canary has answered meanwhile.
        if self._trial.bets() and not seen.canary:
            return "The canary has answered nothing yet."
        if bound is None:
            return "The stable arm has not yet answered enough to compare with."
        what = _BAD.get(self.guard.signal) or name
        stable = f", {_share(seen.stable_bad, seen.stable)} of the stable arm's" if self.guard.ratio else ""
        known = "this is a breach" if self.breached else "no breach is shown"
        return (
            f"{_share(seen.canary_bad, seen.canary)} of the canary's answers {what}{stable}; "
            f"{100 * bound:.3g} % would be allowed: {known}."
        )

    def to_document(self) -> dict[str, Any]:
        return {"breached": self.breached, "log_evidence": self._log_evidence, "trial": self._trial.to_document()}

    def load(self, document: dict[str, Any]) -> None:
        self.breached, self._log_evidence = document["breached"], document["log_evidence"]
        self._trial.load(document["trial"])


class _RateTrial:
    """Of outcomes that are bad or good by what they are."""

    def __init__(self, guard: Guard, miss: float) -> None:
        self._read = _READERS[guard.signal]
        self._bet = RateBet(guard.ratio, guard.slack, miss)

    def see(self, batch: Evidence) -> None:
        self._bet.see(self._read(batch))

    def bets(self) -> Sequence[RateBet]:
        return (self._bet,)

    def names(self) -> Sequence[str]:
        return ("",)

    def to_document(self) -> dict[str, Any]:
        return self._bet.to_document()

    def load(self, document: dict[str, Any]) -> None:
        self._bet = RateBet.from_document(document)


class _LatencyTrial:
    """Of answers that are bad when they take longer than a percentile of the stable arm's first answers.

    The canary's answers wait meanwhile. The limits are set by the stable arm alone, and by answers that they do not
    judge, so they are as good as any that were set beforehand.
    """

    def __init__(self, guard: Guard, miss: float) -> None:
        self._guard = guard
        self._miss = miss / len(_PERCENTILES)
        self._lessons = [0] * _N_BUCKETS
        self._waiting = [0] * _N_BUCKETS
        self._limits: list[list[int]] = []  # last bucket that is in time, for the stable arm and for the canary
        self._bets: list[RateBet] = []

    def see(self, batch: Evidence) -> None:
        stable, canary = _latencies(batch, "stable"), _latencies(batch, "canary")
        if self._bets:
            self._judge(stable, canary)
            return
        self._lessons = [n + more for n, more in zip(self._lessons, stable, strict=True)]
        self._waiting = [n + more for n, more in zip(self._waiting, canary, strict=True)]
        if sum(self._lessons) >= _TIMED_LESSONS:
            self._begin()

    def _begin(self) -> None:
        for percentile in _PERCENTILES:
            stable = _percentile_bucket(self._lessons, percentile)
            limit_s = LATENCY_BOUNDS_S[min(stable, _N_BUCKETS - 2)]
            limit_s = max(limit_s * self._guard.stretch, limit_s + self._guard.allowance_s)
            # Half a per mille less, as 1.21 is two buckets of 1.1 and not three by a rounding error.
            self._limits.append([stable, max(stable, bisect_left(LATENCY_BOUNDS_S, limit_s * 0.9995))])
            self._bets.append(RateBet(self._guard.ratio, self._guard.slack, self._miss))
            self._bets[-1].teach(sum(self._lessons[stable + 1 :]), sum(self._lessons))
        self._judge([0] * _N_BUCKETS, self._waiting)
        self._lessons, self._waiting = [], []

    def _judge(self, stable: Sequence[int], canary: Sequence[int]) -> None:
        n_stable, n_canary = sum(stable), sum(canary)
        if n_stable or n_canary:
            for (stable_limit, canary_limit), bet in zip(self._limits, self._bets, strict=True):
                bet.see(Tally(sum(stable[stable_limit + 1 :]), n_stable, sum(canary[canary_limit + 1 :]), n_canary))

    def bets(self) -> Sequence[RateBet]:
        return self._bets

    def names(self) -> Sequence[str]:
        return [
            f"took over {_milliseconds(canary)} ms (p{percentile} of the stable arm: {_milliseconds(stable)} ms)"
            for percentile, (stable, canary) in zip(_PERCENTILES, self._limits, strict=False)
        ]

    def to_document(self) -> dict[str, Any]:
        bets = [bet.to_document() for bet in self._bets]
        return {"lessons": self._lessons, "waiting": self._waiting, "limits": self._limits, "bets": bets}

    def load(self, document: dict[str, Any]) -> None:
        self._lessons, self._waiting = list(document["lessons"]), list(document["waiting"])
        self._limits = [list(limits) for limits in document["limits"]]
        self._bets = [RateBet.from_document(bet) for bet in document["bets"]]


class _ClassTrial:
    """Of classes that the arms chose for the same windows; a class chosen too seldom shows as another, too often."""

    def __init__(self, guard: Guard, miss: float) -> None:
        self._bets = [PairedBet(guard.ratio, guard.slack) for _ in range(N_CLASSES)]

    def see(self, batch: Evidence) -> None:
        for i, bet in enumerate(self._bets):
            bet.see(_pairs(batch, i))

    def bets(self) -> Sequence[PairedBet]:
        return self._bets

    def names(self) -> Sequence[str]:
        return [f"were of class {i}" for i in range(N_CLASSES)]

    def to_document(self) -> dict[str, Any]:
        return {"bets": [bet.to_document() for bet in self._bets]}

    def load(self, document: dict[str, Any]) -> None:
        self._bets = [PairedBet.from_document(bet) for bet in document["bets"]]


def _open(guard: Guard, miss: float) -> _Trial:
    if guard.signal == "slow":
        return _LatencyTrial(guard, miss)
    return _ClassTrial(guard, miss) if guard.signal == "class_mix" else _RateTrial(guard, miss)


def _live(kind: str) -> Callable[[Evidence], Tally]:
    names = [f"{side}_{name}" for side in ("stable", "canary") for name in (kind, "requests")]
    return lambda batch: Tally(*(batch[name] for name in names))


_READERS: dict[str, Callable[[Evidence], Tally]] = {
    "errors": _live("errors"),
    "invalid": _live("invalid"),
    "disagreement": lambda batch: Tally(canary_bad=batch["shadow_disagreements"], canary=batch["shadow_windows"]),
    "regression": lambda batch: Tally(canary_bad=batch["shadow_outside_interval"], canary=batch["shadow_gaps"]),
}

_LATENCY_NAMES = {
    side: tuple(f"{side}_latency_{i}" for i in range(_N_BUCKETS)) for side in ("stable", "canary")
}  # made once: they are looked up at every tick


def _latencies(batch: Evidence, side: str) -> list[int]:
    return [batch[name] for name in _LATENCY_NAMES[side]]


def _pairs(batch: Evidence, chosen: int) -> Pairs:
    pairs = Pairs()
    for stable in range(N_CLASSES):
        for canary in range(N_CLASSES):
            n = batch[f"shadow_pair_{stable}_{canary}"]
            if stable == chosen:
                pairs.add(Pairs(both=n) if canary == chosen else Pairs(stable_alone=n))
            else:
                pairs.add(Pairs(canary_alone=n) if canary == chosen else Pairs(neither=n))
    return pairs


def _percentile_bucket(counts: Sequence[int], percentile: int) -> int:
    """The bucket in which the percentile lies."""
    return bisect_left(list(accumulate(counts)), sum(counts) * percentile / 100)


def _milliseconds(bucket: int) -> str:
    return f"{1000 * LATENCY_BOUNDS_S[bucket]:.3g}" if bucket < len(LATENCY_BOUNDS_S) else "∞"


def _bound(guard: Guard, seen: Tally) -> float | None:
    if guard.ratio == 0:
        return guard.slack
    return min(1.0, guard.ratio * seen.stable_bad / seen.stable + guard.slack) if seen.stable else None


def _share(bad: int, n: int) -> str:
    return f"{bad} of {n}" + (f" ({100 * bad / n:.3g} %)" if n else "")
