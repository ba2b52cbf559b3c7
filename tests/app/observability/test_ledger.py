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
    clock.now += 0.0005
    assert ledger.server_timing() == "auth;dur=1.500, decode;dur=0.500, total;dur=2.000"
    assert re.fullmatch(r"\w+;dur=[\d.]+(, \w+;dur=[\d.]+)*", ledger.server_timing())


def test_what_follows_the_last_mark_belongs_to_the_answer_s_writing(clock: Clock) -> None:
    ledger = Ledger(clock)
    ledger.close_call({})
    clock.now += 0.002
    ledger.close_stage("encode")
    clock.now += 0.001
    assert ledger.server_timing().endswith("encode;dur=3.000, total;dur=3.000")


@pytest.mark.parametrize(
    ("closed", "refused_in"), [([], "auth"), (["auth"], "decode"), (["auth", "decode", "limit"], "transport")]
)
def test_a_refusal_s_time_belongs_to_the_stage_that_it_came_from(
    clock: Clock, closed: list[str], refused_in: str
) -> None:
    ledger = Ledger(clock)
    ledger.open_stage = "auth"
    for stage in closed:
        ledger.close_stage(stage)
    clock.now += 0.100
    assert ledger.server_timing().endswith(f"{refused_in};dur=100.000, total;dur=100.000")


def test_a_request_without_stages_has_a_total_alone(clock: Clock) -> None:
    ledger = Ledger(clock)
    clock.now += 0.004
    assert ledger.server_timing() == "total;dur=4.000"


def test_ids_are_never_given_twice(clock: Clock) -> None:
    assert len({Ledger(clock).request_id for _ in range(10_000)}) == 10_000
