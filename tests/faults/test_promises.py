"""The rules by which a ledger is judged: each keeps what was promised, and breaks on what was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults import report
from tests.faults.catalogue import ALL
from tests.faults.laboratory import Laboratory
from tests.faults.promises import (
    by_legacy,
    by_ray,
    from_arm,
    gateway_lives,
    in_time,
    nothing_lost,
    only,
    probe_once_says,
    probe_says,
    quick_but_for,
    recovers,
    refused_quickly,
    shows,
    supervisor_lives,
)
from tests.faults.scenario import Evidence, Floor, Happening, is_lost, undone
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


def test_an_empty_ledger_keeps_nothing() -> None:
    ledger = evidence(fault=1.0, cure=2.0)
    for promise in (nothing_lost, in_time, quick_but_for(3, "fault", "cure", over_ms=1), shows("fault", "cure")):
        assert not promise(ledger).kept


def test_a_fault_that_nobody_felt_did_not_show() -> None:
    ledger = evidence(result(1, 503), result(3), result(5, 503), fault=2.0, cure=4.0)
    assert not shows("fault", "cure")(ledger).kept
    assert shows("fault", "cure")(evidence(result(3, x_fallback="unavailable"), fault=2.0, cure=4.0)).kept
    assert shows("fault", "cure")(evidence(result(3, 503), fault=2.0, cure=4.0)).kept


def test_an_arm_is_back_only_after_another_has_answered_for_it() -> None:
    rays, helped = every_100_ms(2, 4, x_served_by="ray_serve"), result(2.95, x_served_by="legacy")
    back = recovers("fault", 2.0, by_ray, once=by_legacy)
    assert not back(evidence(*rays, fault=2.0)).kept
    ledger = evidence(*sorted([*rays, helped], key=lambda each: each.due), fault=2.0)
    for _ in range(2):  # a rule remembers nothing of the ledger before
        assert back(ledger).recovery_s == pytest.approx(1.01)


def test_a_probe_is_judged_in_the_time_that_was_promised() -> None:
    ledger = evidence(fault=2.0, cure=6.0)
    said = [*every_100_ms(0, 3), *every_100_ms(3, 5.5, 503), *every_100_ms(5.5, 7)]
    ledger.probes = Load([each._replace(stream="ready") for each in said], 0.0, 10.0)
    assert probe_says("ready", 503, "fault", "cure", skip_s=1.05, before_s=0.55)(ledger).kept
    assert not probe_says("ready", 503, "fault", "cure", skip_s=0.5, before_s=0.55)(ledger).kept
    assert not probe_says("ready", 503, "fault", "cure", skip_s=1.05)(ledger).kept
    assert probe_once_says("ready", 503, "fault", "cure")(ledger).kept
    assert not probe_once_says("ready", 500, "fault", "cure")(ledger).kept


@pytest.mark.parametrize("at_the_end", [[1, 3], [], None])
def test_a_gateway_whose_worker_was_replaced_has_not_lived(at_the_end: list[int] | None) -> None:
    ledger = evidence(result(1))
    ledger.floor.gateway = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]
    ledger.floor.notes |= {"workers": [1, 2], "workers at the end": [1, 2]}
    assert gateway_lives(ledger).kept
    ledger.floor.notes["workers at the end"] = at_the_end
    assert not gateway_lives(ledger).kept
    assert supervisor_lives(ledger).kept


def test_a_scenario_that_could_not_be_done_takes_the_place_of_its_kept_row() -> None:
    row = undone(ALL[0], "no reason")
    assert not row.kept
    kept = replace(row, kept=True)
    assert report.merge([kept], row, [row.name]) == [row]
    assert "**broken**" in report.line(row)


def test_a_row_of_an_unknown_commit_is_not_recorded(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    page.write_text(report.BEGIN + report.END)
    row = replace(undone(ALL[0], "no reason"), date="2030-01-02", commit="abc1234")
    report.record([row], page, "here")
    assert "2030-01-02 abc1234" in page.read_text()
    with pytest.raises(ValueError, match=row.name):
        report.record([replace(row, commit="")], page, "here")


def test_everything_is_undone_whatever_one_undoing_raises() -> None:
    done: list[str] = []
    lab = Laboratory()

    def fail() -> None:
        raise RuntimeError

    lab.afterwards(lambda: done.append("first"))
    lab.afterwards(fail)
    lab.afterwards(lambda: done.append("last"))
    with pytest.raises(ExceptionGroup):
        lab.clear()
    assert done == ["last", "first"]
    lab.folder.rmdir()
