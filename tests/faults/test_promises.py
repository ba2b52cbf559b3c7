"""The rules by which a ledger is judged: each keeps what was promised, and breaks on what was not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.promises import (
    by_ray,
    from_arm,
    in_time,
    nothing_lost,
    only,
    quick_but_for,
    recovers,
    refused_quickly,
)
from tests.faults.scenario import Evidence, Floor, Happening, is_lost
from tests.integration.open_loop import Load, Result


def result(due: float, status: int = 200, *, took: float = 0.01, error: str = "", **headers: str) -> Result:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Result(int(1e3 * due), "desk", "kept", due, due, due + took, status, error, "1", "", fields)


def evidence(*results: Result, **happened: float) -> Evidence:
    """A ledger, and steps that were done in no time."""
    steps = {name: Happening(at, at) for name, at in happened.items()}
    nobody: Any = None
    return Evidence(Load(list(results), 0.0, 10.0), Load([], 0.0, 10.0), steps, Floor(nobody, nobody))


def every_100_ms(start: float, end: float, status: int = 200, **more: Any) -> list[Result]:
    return [result(start + 0.1 * number, status, **more) for number in range(round((end - start) / 0.1))]


@pytest.mark.parametrize("status", [200, 401, 429, 502, 503, 504])
def test_an_answer_with_a_meaning_is_not_lost(status: int) -> None:
    assert not is_lost(result(1, status))


@pytest.mark.parametrize("status", [0, 500, 501, 505])
def test_silence_and_faults_of_ours_are_lost(status: int) -> None:
    assert is_lost(result(1, status))
    assert not nothing_lost(evidence(result(1), result(2, status, error="torn"))).kept


def test_an_answer_after_the_deadline_and_50_ms_is_late() -> None:
    assert in_time(evidence(result(1, 504, took=2.04))).kept
    assert not in_time(evidence(result(1, 504, took=2.06))).kept


def test_only_looks_at_the_time_between_its_steps() -> None:
    ledger = evidence(result(1, 503), result(3), result(5, 503), fault=2.0, cure=4.0)
    assert only(200, since="fault", until="cure")(ledger).kept
    assert not only(200)(ledger).kept
    assert not only(200, since="cure")(ledger).kept


def test_no_request_at_all_keeps_no_promise() -> None:
    assert not only(200, since="fault")(evidence(result(1), fault=2.0)).kept
    assert not from_arm("ray_serve")(evidence()).kept


def test_recovery_counts_from_the_step_to_the_first_of_several_good_answers() -> None:
    bad, good = every_100_ms(2, 4, 503), every_100_ms(4, 6, x_served_by="ray_serve")
    finding = recovers("fault", 2.1, by_ray)(evidence(*bad, *good, fault=2.0))
    assert finding.kept
    assert finding.recovery_s == pytest.approx(2.01)
    assert not recovers("fault", 1.9, by_ray)(evidence(*bad, *good, fault=2.0)).kept


def test_one_good_answer_among_bad_ones_is_no_recovery() -> None:
    flapping = [result(2 + 0.1 * number, 200 if number % 2 else 503) for number in range(20)]
    assert not recovers("fault", 10)(evidence(*flapping, fault=2.0)).kept


def test_refusals_must_be_quick_and_say_when_to_come_back() -> None:
    quick = every_100_ms(2, 4, 503, took=0.005, retry_after="5")
    assert refused_quickly("fault", None, 20, skip_s=0)(evidence(*quick, fault=2.0)).kept
    slow = every_100_ms(2, 4, 503, took=0.05, retry_after="5")
    assert not refused_quickly("fault", None, 20, skip_s=0)(evidence(*slow, fault=2.0)).kept
    mute = every_100_ms(2, 4, 503, took=0.005)
    assert not refused_quickly("fault", None, 20, skip_s=0)(evidence(*mute, fault=2.0)).kept


def test_slow_answers_after_a_fault_are_measured_by_those_before_it() -> None:
    calm, slow = every_100_ms(0, 2), every_100_ms(2, 2.5, took=0.06)
    assert not quick_but_for(3, "fault", None, over_ms=45)(evidence(*calm, *slow, fault=2.0)).kept
    assert quick_but_for(5, "fault", None, over_ms=45)(evidence(*calm, *slow, fault=2.0)).kept
    noisy = every_100_ms(0, 2, took=0.06)
    assert quick_but_for(0, "fault", None, over_ms=45)(evidence(*noisy, *slow, fault=2.0)).kept
