"""Bets against the claim that a canary keeps its guard: their wealth is the evidence that it does not.

Whoever bets at fair odds grows rich only by luck while the claim holds: of all that is won and lost at such bets, begun
with 1, more than x is ever reached with a chance of at most 1/x (Ville's inequality), however often one looks and
whenever one stops. So "wealth has reached 1/alpha" is a test that may be looked at after every request. See Ramdas,
Grünwald, Vovk and Shafer, "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 38 (2023).

All bets here are fixed before the outcomes that settle them are seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import exp, inf, lgamma, log, log1p, pi
from typing import Any

# What the canary's odds of a bad answer may really be, as multiples of the odds that the guard allows: an alternative
# for a slight breach up to one for a model that always fails. Wealth is divided among them.
_TIMES_ODDS = (1.5, 3.0, 10.0)

# How much of its greatest possible stake a paired bet puts down.
_STAKES = (0.05, 0.15, 0.45)

# Half of the wealth is bet from the start. The other half follows as the canary's outcomes come, the more slowly the
# more of them have come, so that a canary that goes bad late still meets money that has lost nothing.
_EARLY_OUTCOMES = 100

# The stable arm's first outcomes teach what its rate is, and are not bet on.
_LESSONS = 50

# What was learned of the stable arm's rate is halved in weight beyond this, so that it follows a rate that drifts.
_MEMORY = 20_000.0

# The canary's outcomes that wait for one of the stable arm, before the arm is taken for silent.
_PATIENCE = 50


def log_sum(logs: Sequence[float]) -> float:
    """Natural logarithm of the sum of numbers given by their logarithms."""
    top = max(logs)
    return top + log(sum(exp(x - top) for x in logs)) if top > -inf else -inf


def log_mean(logs: Sequence[float]) -> float:
    return log_sum(logs) - log(len(logs))


@dataclass(slots=True)
class Purse:
    """Wealth that begins with 1, by natural logarithms: cash, and what is staked on each of several alternatives.

    To move cash to the stakes by a rule that looks at no outcome is as fair as the bets are: it is a mixture over the
    times at which betting begins.
    """

    log_cash: float
    log_stakes: list[float]
    n_outcomes: int = 0

    @classmethod
    def divided(cls, n_alternatives: int) -> Purse:
        return cls(log(0.5), [log(0.5 / n_alternatives)] * n_alternatives)

    def log_wealth(self) -> float:
        return log_sum([self.log_cash, *self.log_stakes])

    def settle(self, log_factors: Sequence[float], n_outcomes: int) -> None:
        """Multiply each alternative's stake by its e-variable for `n_outcomes` more of the canary."""
        kept = ((_EARLY_OUTCOMES + self.n_outcomes) / (_EARLY_OUTCOMES + self.n_outcomes + n_outcomes)) ** 0.5
        if n_outcomes:
            moved = self.log_cash + log1p(-kept) - log(len(self.log_stakes))
            self.log_stakes = [log_sum([stake, moved]) for stake in self.log_stakes]
            self.log_cash += log(kept)
            self.n_outcomes += n_outcomes
        self.log_stakes = [stake + factor for stake, factor in zip(self.log_stakes, log_factors, strict=True)]


@dataclass(slots=True)
class Tally:
    """Bad outcomes and all outcomes of both sides."""

    stable_bad: int = 0
    stable: int = 0
    canary_bad: int = 0
    canary: int = 0

    def add(self, other: Tally) -> None:
        self.stable_bad += other.stable_bad
        self.stable += other.stable
        self.canary_bad += other.canary_bad
        self.canary += other.canary


@dataclass(slots=True)
class RateBet:
    """A bet against "the canary's rate of bad outcomes is at most ratio × the stable arm's + slack".

    Outcomes are taken as independent, and how many come as no consequence of what they are. The rates themselves may
    change from one settlement to the next, as long as the claim holds in each.

    For n_s and n_c outcomes and an alternative (a_s, a_c) beyond the claim, the stake is multiplied by the likelihood
    ratio of the alternative against that pair (s, c = ratio·s + slack) on the claim's boundary which minimises
    n_s·KL(a_s‖s) + n_c·KL(a_c‖c). Its expectation is at most 1 wherever the claim holds. With
    u = (a - p) / (p (1 - p)), an outcome's expected ratio at the true rate t is 1 + (t - p)·u, and u_s ≤ 0 ≤ u_c. As
    u_c is not negative, a true canary on the boundary is the worst case, with the product
    (1 + (t - s)·u_s)^n_s · (1 + ratio·(t - s)·u_c)^n_c. A geometric mean is at most the arithmetic one: its
    (n_s + n_c)th root is at most 1 + (t - s)·(n_s·u_s + n_c·ratio·u_c) / (n_s + n_c), and that is 1, since the bracket
    is 0 at the minimum. After Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests that
    allow for optional stopping" (arXiv:2106.02693), where ratio = 1 and slack = 0; here the sides may differ in number.

    Where the stable arm is silent, as when the canary answers everybody, the claim is bet against with the stable arm's
    highest rate that its outcomes so far allow, and the chance `miss` that it is higher still.

    Attributes:
        ratio: 0 or more; 0 for a claim that does not look at the stable arm.
        slack: 0..1.
        miss: Chance that the silent arm's bound is too low, over all time.
        learned_bad: Of `learned` outcomes of the stable arm, those that were bad.
        waiting: Outcomes not yet settled.
        settled: Outcomes of the past, the stable arm's lessons among them.
    """

    ratio: float
    slack: float
    miss: float
    learned_bad: float = 0.0
    learned: float = 0.0
    waiting: Tally = field(default_factory=Tally)
    settled: Tally = field(default_factory=Tally)
    purse: Purse = field(default_factory=lambda: Purse.divided(len(_TIMES_ODDS)))

    def teach(self, bad: int, n: int) -> None:
        """Outcomes of the stable arm that only say what its rate may be, as by them it was chosen what is bad."""
        self.learned_bad += bad
        self.learned += n
        if self.learned > _MEMORY:
            self.learned_bad /= 2
            self.learned /= 2

    def see(self, outcomes: Tally) -> None:
        """Take further outcomes, and settle what can be settled."""
        if not (outcomes.stable or outcomes.canary):
            return
        if self.ratio and self.learned < _LESSONS:
            self.teach(outcomes.stable_bad, outcomes.stable)
            self.settled.add(Tally(outcomes.stable_bad, outcomes.stable))
            outcomes = Tally(canary_bad=outcomes.canary_bad, canary=outcomes.canary)
        self.waiting.add(outcomes)
        if self.ratio == 0:
            self._settle(self._against_bound(self.slack))
        elif self.waiting.stable and self.waiting.canary:
            self._settle(self._against_stable())
        elif self.waiting.canary >= _PATIENCE and self.settled.stable:
            self._settle(self._against_bound(self.ratio * self._highest_stable_rate() + self.slack))

    def seen(self) -> Tally:
        """All outcomes, settled or waiting; those by which something was chosen (`teach`) are left out."""
        total = Tally()
        total.add(self.settled)
        total.add(self.waiting)
        return total

    def _settle(self, log_factors: Sequence[float]) -> None:
        now, self.waiting = self.waiting, Tally()
        self.purse.settle(log_factors, now.canary)
        self.settled.add(now)
        self.teach(now.stable_bad, now.stable)

    def _against_stable(self) -> list[float]:
        now = self.waiting
        stable = (self.learned_bad + 0.5) / (self.learned + 1.0)
        factors = []
        for canary in _alternatives(self.ratio * stable + self.slack):
            s = nearest_claim(stable, canary, now.stable, now.canary, ratio=self.ratio, slack=self.slack)
            c = self.ratio * s + self.slack
            factors.append(
                _log_ratio(now.stable_bad, now.stable, stable, s) + _log_ratio(now.canary_bad, now.canary, canary, c)
            )
        return factors or [0.0] * len(_TIMES_ODDS)

    def _against_bound(self, bound: float) -> list[float]:
        now = self.waiting
        factors = [_log_ratio(now.canary_bad, now.canary, canary, bound) for canary in _alternatives(bound)]
        return factors or [0.0] * len(_TIMES_ODDS)

    def _highest_stable_rate(self) -> float:
        return highest_rate(self.settled.stable_bad, self.settled.stable, self.miss)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> RateBet:
        parts = {"waiting": Tally, "settled": Tally, "purse": Purse}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in document.items()})

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Pairs:
    """Windows that both arms judged, by whether each chose some class."""

    both: int = 0
    canary_alone: int = 0
    stable_alone: int = 0
    neither: int = 0

    def add(self, other: Pairs) -> None:
        self.both += other.both
        self.canary_alone += other.canary_alone
        self.stable_alone += other.stable_alone
        self.neither += other.neither


@dataclass(slots=True)
class PairedBet:
    """A bet against "canary's rate ≤ ratio × stable's rate + slack" where both arms answered the same windows.

    With C and S 1 or 0 for each window, the claim says that X = C - ratio·S - slack has a mean of at most 0. As X is
    at least -(ratio + slack), the stake times 1 + λX is never negative for λ ≤ 1 / (ratio + slack), and not expected to
    grow, whatever joins C to S. A bet on a bounded mean, after Waudby-Smith and Ramdas, "Estimating means of bounded
    random variables by betting", JRSS B 86 (2024). Only windows are taken as independent, never a window's two answers.
    Windows on which the arms agree cost next to nothing, so it is nearly as sharp as McNemar's test.
    """

    ratio: float
    slack: float
    settled: Pairs = field(default_factory=Pairs)
    purse: Purse = field(default_factory=lambda: Purse.divided(len(_STAKES)))

    def see(self, pairs: Pairs) -> None:
        if n := pairs.both + pairs.canary_alone + pairs.stable_alone + pairs.neither:
            greatest = 1.0 / (self.ratio + self.slack)
            self.purse.settle([self._log_factor(pairs, stake * greatest) for stake in _STAKES], n)
            self.settled.add(pairs)

    def seen(self) -> Tally:
        s = self.settled
        n = s.both + s.canary_alone + s.stable_alone + s.neither
        return Tally(s.both + s.stable_alone, n, s.both + s.canary_alone, n)

    def _log_factor(self, pairs: Pairs, stake: float) -> float:
        return (
            pairs.both * log1p(stake * (1 - self.ratio - self.slack))
            + pairs.canary_alone * log1p(stake * (1 - self.slack))
            + pairs.stable_alone * log1p(stake * (-self.ratio - self.slack))
            + pairs.neither * log1p(stake * -self.slack)
        )

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> PairedBet:
        parts = {"settled": Pairs, "purse": Purse}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in document.items()})

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


def nearest_claim(stable: float, canary: float, n_stable: int, n_canary: int, *, ratio: float, slack: float) -> float:
    """The stable rate s that minimises n_s·KL(stable‖s) + n_c·KL(canary‖ratio·s + slack).

    Args:
        stable: The alternative's stable rate, in (0, 1).
        canary: Its canary rate, in (ratio·stable + slack, 1).
        n_stable: Outcomes, at least 1.
        n_canary: At least 1.
        ratio: Above 0.
        slack: 0 or more.
    """
    low, high = stable, min((canary - slack) / ratio, 1.0 - 1e-15)
    s = (n_stable * stable + n_canary * high) / (n_stable + n_canary)
    for _ in range(100):
        c = ratio * s + slack
        dv_s, dv_c = s * (1 - s), c * (1 - c)
        u_s, u_c = (stable - s) / dv_s, (canary - c) / dv_c
        gain = n_stable * u_s + n_canary * ratio * u_c
        low, high = (s, high) if gain > 0 else (low, s)
        slope = -n_stable * (1 + u_s * (1 - 2 * s)) / dv_s - n_canary * ratio * ratio * (1 + u_c * (1 - 2 * c)) / dv_c
        tried = s - gain / slope
        tried = tried if low < tried < high else (low + high) / 2
        if abs(tried - s) <= 1e-9 * s:  # and by the square of that, nearly, from the minimum
            return tried
        s = tried
    return s


def highest_rate(bad: int, n: int, miss: float) -> float:
    """An upper bound of a rate that holds at all times at once but for the chance `miss`, 0..1.

    It leaves out the rates against which the mixture of all rates by Jeffreys' prior, Beta(1/2, 1/2), has won 1 / miss:
    Robbins, "Statistical methods related to the law of the iterated logarithm", Ann. Math. Statist. 41 (1970).
    """
    if n == 0:
        return 1.0
    mixture = lgamma(bad + 0.5) + lgamma(n - bad + 0.5) - lgamma(n + 1.0) - log(pi)
    low, high = bad / n, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        if rate >= 1.0:
            break
        won = mixture - (bad * log(rate) if bad else 0.0) - (n - bad) * log1p(-rate)
        low, high = (low, rate) if won >= -log(miss) else (rate, high)
    return high


def _alternatives(bound: float) -> Iterator[float]:
    """Rates above the bound; none where everything is allowed."""
    if bound < 1.0:
        odds = bound / (1.0 - bound)
        yield from (times * odds / (1.0 + times * odds) for times in _TIMES_ODDS)


def _log_ratio(bad: int, n: int, alternative: float, claim: float) -> float:
    """Log-likelihood of the alternative rate less that of the claimed one, for `bad` of `n`."""
    return bad * log(alternative / claim) + (n - bad) * (log1p(-alternative) - log1p(-claim))
