"""Retries are a tenth of the calls at most, and a few where there are hardly any calls."""

from __future__ import annotations

import pytest

from app.backends.retries import BURST, RetryBudget


class Rig:
    def __init__(self) -> None:
        self.now = 100.0
        self.budget = RetryBudget(lambda: self.now)

    def drain(self) -> int:
        """Retries that are granted now, one after another."""
        granted = 0
        while self.budget.spend():
            granted += 1
        return granted


def test_a_few_are_granted_from_the_start_and_then_none() -> None:
    rig = Rig()
    assert rig.drain() == BURST
    assert not rig.budget.spend()


def test_a_tenth_of_the_calls_may_be_sent_again() -> None:
    rig = Rig()
    rig.drain()
    granted = 0
    for _ in range(1000):
        rig.budget.earn()
        granted += rig.budget.spend()
    assert granted == pytest.approx(100, abs=1)


def test_where_there_are_hardly_any_calls_time_grants_one_a_second() -> None:
    rig = Rig()
    rig.drain()
    rig.now += 3
    assert rig.drain() == 3


def test_a_quiet_hour_saves_up_no_storm() -> None:
    rig = Rig()
    rig.now += 3600
    for _ in range(10_000):
        rig.budget.earn()
    assert rig.drain() == BURST
