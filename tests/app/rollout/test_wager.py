from __future__ import annotations

import json
from math import comb, exp, log

import numpy as np
import pytest

from app.rollout.wager import PairedBet, Pairs, RateBet, Tally, highest_rate, nearest_claim


def _chance(k: int, n: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def _wealth_expected(bet: dict[str, object], n_s: int, n_c: int, t_s: float, t_c: float) -> float:
    """Exact: over every outcome there can be."""
    total = 0.0
    for k_s in range(n_s + 1):
        for k_c in range(n_c + 1):
            after = RateBet.from_document(json.loads(json.dumps(bet)))
            after.see(Tally(k_s, n_s, k_c, n_c))
            total += _chance(k_s, n_s, t_s) * _chance(k_c, n_c, t_c) * exp(after.purse.log_wealth())
    return total


@pytest.mark.parametrize(("ratio", "slack"), [(1.0, 0.002), (1.25, 0.01), (0.5, 0.1), (2.0, 0.0)])
@pytest.mark.parametrize(("n_s", "n_c"), [(1, 1), (30, 1), (2, 9), (12, 12)])
def test_no_pair_of_rates_that_keeps_the_guard_makes_a_bet_profitable(
    ratio: float, slack: float, n_s: int, n_c: int
) -> None:
    for learned_bad in (0.0, 3.0, 30.0):  # right and wrong about the stable arm
        bet = RateBet(ratio, slack, 1e-4, learned_bad=learned_bad, learned=100.0).to_document()
        for t_s in (0.0, 0.004, 0.03, 0.3, 0.45):
            bound = min(1.0, ratio * t_s + slack)
            for t_c in (bound, bound / 2):
                assert _wealth_expected(bet, n_s, n_c, t_s, t_c) <= 1 + 1e-7


def test_a_canary_beyond_its_guard_makes_the_bet_profitable() -> None:
    bet = RateBet(1.0, 0.002, 1e-4, learned_bad=1.0, learned=100.0).to_document()
    assert _wealth_expected(bet, 30, 10, 0.01, 0.1) > 1.1


@pytest.mark.parametrize(("ratio", "slack"), [(1.0, 0.02), (1.5, 0.0), (0.0, 0.1)])
def test_paired_bets_are_fair_however_the_two_answers_hang_together(ratio: float, slack: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        both, canary_alone, stable_alone, neither = rng.dirichlet([0.5] * 4)
        excess = both + canary_alone - ratio * (both + stable_alone) - slack
        if excess > 0:
            continue
        outcomes = (
            (both, Pairs(both=1)),
            (canary_alone, Pairs(canary_alone=1)),
            (stable_alone, Pairs(stable_alone=1)),
            (neither, Pairs(neither=1)),
        )
        expected = 0.0
        for chance, pair in outcomes:
            bet = PairedBet(ratio, slack)
            bet.see(pair)
            expected += chance * exp(bet.purse.log_wealth())
        assert expected <= 1 + 1e-9


def test_the_nearest_claim_is_the_least_of_all() -> None:
    for stable, canary, n_s, n_c, ratio, slack in (
        (0.01, 0.05, 990, 10, 1.0, 0.002),
        (0.1, 0.4, 5, 50, 1.25, 0.01),
        (0.3, 0.9, 7, 7, 0.5, 0.1),
    ):

        def cost(s: float) -> float:
            c = ratio * s + slack  # noqa: B023
            return n_s * _kl(stable, s) + n_c * _kl(canary, c)  # noqa: B023

        found = nearest_claim(stable, canary, n_s, n_c, ratio=ratio, slack=slack)
        grid = np.linspace(stable, min((canary - slack) / ratio, 0.999), 2001)[1:-1]
        assert cost(found) <= min(map(cost, grid)) + 1e-12


def test_the_stable_arms_first_outcomes_are_learned_from_and_the_canarys_wait() -> None:
    bet = RateBet(1.0, 0.002, 1e-4)
    bet.see(Tally(0, 49, 5, 10))
    assert bet.purse.log_wealth() == pytest.approx(0.0)
    bet.see(Tally(0, 10, 0, 0))
    bet.see(Tally(0, 10, 0, 0))
    assert bet.purse.log_wealth() > 0
    assert bet.seen() == Tally(0, 69, 5, 10)


def test_a_silent_stable_arm_is_replaced_by_the_highest_rate_that_it_may_have() -> None:
    bet = RateBet(1.0, 0.002, 1e-4)
    bet.see(Tally(100, 10_000, 1, 100))
    for _ in range(40):
        bet.see(Tally(0, 0, 5, 100))
    assert bet.purse.log_wealth() > log(1000)
    kept = RateBet(1.0, 0.002, 1e-4)
    kept.see(Tally(100, 10_000, 1, 100))
    for _ in range(40):
        kept.see(Tally(0, 0, 1, 100))
    assert kept.purse.log_wealth() < 0


def test_a_bound_on_a_rate_holds_at_all_times_at_once() -> None:
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(400):
        k = np.cumsum(rng.random(1000) < 0.02)
        missed += any(highest_rate(int(k[n - 1]), n, 0.05) < 0.02 for n in range(10, 1001, 45))
    assert missed <= 400 * 0.05
    assert highest_rate(0, 0, 0.05) == 1.0
    assert highest_rate(20, 1000, 0.05) < 0.05


def test_a_canary_that_goes_bad_late_is_caught_all_the_same() -> None:
    bet = RateBet(0.0, 0.001, 1e-4)
    bet.see(Tally(canary=50_000))
    for _ in range(20):
        bet.see(Tally(canary_bad=5, canary=100))
    assert bet.purse.log_wealth() > log(1000)


def _kl(a: float, p: float) -> float:
    return a * log(a / p) + (1 - a) * log((1 - a) / (1 - p))
