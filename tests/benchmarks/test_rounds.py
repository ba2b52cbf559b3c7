"""The plan: what is measured, in which order, for how long."""

from __future__ import annotations

import pytest

from benchmarks.rounds import (
    NOOP,
    SHIPPED,
    SMALL,
    Cell,
    Session,
    around_s,
    fit_cell_s,
    full_sessions,
    quick_sessions,
    rotate,
)

LANES = {
    "document_stack": ("json",),
    "sluice": ("json", "binary", "oip_binary"),
    "triton": ("json", "binary"),
    "mosec": ("json", "binary"),
    "mosec_10ms": ("json",),
}


def cells_of(sessions: tuple[Session, ...], system: str, model: str) -> tuple[Cell, ...]:
    return next((s.cells for s in sessions if (s.system, s.model) == (system, model)), ())


def test_each_round_begins_with_another_system_and_keeps_models_together() -> None:
    sessions = [Session(name, model, ()) for model in ("a", "b") for name in ("x", "y", "z")]
    orders = [[s.system for s in rotate(sessions, number)] for number in range(3)]
    assert orders == [["x", "y", "z"] * 2, ["y", "z", "x"] * 2, ["z", "x", "y"] * 2]
    assert [s.model for s in rotate(sessions, 1)] == ["a"] * 3 + ["b"] * 3
    assert rotate(sessions, 3) == sessions


def test_the_quick_plan_holds_what_every_goal_is_judged_by() -> None:
    sessions = quick_sessions(LANES)
    assert {Cell("json", 1), Cell("json", 32)} <= set(cells_of(sessions, "document_stack", NOOP))
    for lane in ("json", "binary"):
        assert {Cell(lane, 1), Cell(lane, 32, is_open=True)} <= set(cells_of(sessions, "sluice", NOOP))
    for system in ("sluice", "triton"):
        assert Cell("binary", 32, windows=8, is_open=True) in cells_of(sessions, system, SMALL)
        assert Cell("binary", 32, is_open=True) in cells_of(sessions, system, SHIPPED)
    assert cells_of(sessions, "mosec", SHIPPED) == (Cell("binary", 32),)
    assert not cells_of(sessions, "mosec_10ms", NOOP)


def test_the_full_plan_has_every_system_on_every_model_at_four_numbers_of_connections() -> None:
    sessions = full_sessions(LANES)
    assert {(s.system, s.model) for s in sessions} == {(n, m) for n in LANES for m in (NOOP, SMALL, SHIPPED)}
    for session in sessions:
        asked = {(cell.lane, cell.connections) for cell in session.cells}
        assert asked == {(lane, n) for lane in LANES[session.system] for n in (1, 8, 32, 128)}


def test_loads_get_what_starts_leave_of_the_budget() -> None:
    sessions = [Session("x", NOOP, (Cell("json", 1), Cell("json", 32, is_open=True)))]  # three loads
    starts_s = {"x": 10.0}
    fixed_s = around_s(sessions, starts_s)
    assert fixed_s > 10.0
    assert fit_cell_s(sessions, left_s=2 * (fixed_s + 12.5), rounds=2, starts_s=starts_s) == 4
    assert fit_cell_s(sessions, left_s=1.0, rounds=2, starts_s=starts_s) == 1
    assert fit_cell_s(sessions, left_s=1e6, rounds=2, starts_s=starts_s) == 10


def test_a_start_that_was_seen_replaces_the_guess() -> None:
    sessions = [Session("sluice", NOOP, ())]
    assert around_s(sessions, {"sluice": 100.0}) - around_s(sessions, {"sluice": 10.0}) == pytest.approx(90.0)
    assert around_s(sessions, {}) == around_s(sessions, {"someone else": 1.0})
