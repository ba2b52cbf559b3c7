from __future__ import annotations

import re

import pytest

from app.observability.ledger import STAGES, Ledger


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_stages_add_up_to_the_total_exactly(clock: Clock) -> None:
    ledger = Ledger(clock)
    for stage, seconds in (("auth", 0.001), ("decode", 0.002), ("limit", 0.0005)):
        clock.now += seconds
        ledger.close_stage(stage)
    clock.now += 0.050
    ledger.close_call({"queue": 10.0, "transport": 1.0, "batch": 5.0, "model": 20.0})
    clock.now += 0.003
    ledger.close_stage("encode")
    assert set(ledger.stages_ms) == set(STAGES)
    assert sum(ledger.stages_ms.values()) == pytest.approx(ledger.total_ms())
    assert ledger.stages_ms["transport"] == pytest.approx(15.0)  # what the backend did not see is on the way


def test_a_backend_that_reports_more_than_passed_makes_no_negative_time(clock: Clock) -> None:
    ledger = Ledger(clock)
    clock.now += 0.001
    ledger.close_call({"model": 50.0})
    assert ledger.stages_ms["transport"] == 0.0


def test_server_timing_has_the_standard_s_form(clock: Clock) -> None:
    ledger = Ledger(clock)
    clock.now += 0.0015
    ledger.close_stage("auth")
    assert ledger.server_timing() == "auth;dur=1.500, total;dur=1.500"
    assert re.fullmatch(r"\w+;dur=[\d.]+(, \w+;dur=[\d.]+)*", ledger.server_timing())


def test_ids_are_never_given_twice(clock: Clock) -> None:
    assert len({Ledger(clock).request_id for _ in range(10_000)}) == 10_000
