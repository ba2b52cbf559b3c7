from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.rollout.plan import Freeze, Guard, Plan

WINDOW = {"begin": "09:30", "end": "16:00"}
LEGACY = {"backend": "legacy"}


@pytest.mark.parametrize(
    ("guard", "fault"),
    [
        ({"signal": "errors", "ratio": 0}, "allows nothing at all"),
        ({"signal": "disagreement", "slack": 0.1}, "has no stable rate"),
        ({"signal": "errors", "stretch": 2}, "for the guard on slow answers"),
        ({"signal": "invalid", "allowance_s": 1}, "for the guard on slow answers"),
        ({"signal": "slow", "ratio": 0, "slack": 0.1}, "set a ratio"),
        ({"signal": "cost"}, "signal"),
        ({"signal": "errors", "slack": float("nan")}, "finite"),
    ],
)
def test_a_guard_that_bounds_nothing_or_something_else_is_refused(guard: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Guard.model_validate(guard)


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        ({"steps": [{"share": 0.5}, {"share": 0.5}]}, "shares must grow"),
        ({"steps": []}, "at least 1 item"),
        ({"stable": LEGACY, "canary": LEGACY}, "the same arm"),
        ({"guards": [{"signal": "errors"}, {"signal": "errors"}]}, "one guard per signal"),
        ({"guards": [{"signal": "class_mix"}]}, "need a shadow"),
        ({"guards": [{"signal": "regression", "ratio": 0, "slack": 0.1}]}, "guards on regression need a shadow"),
        ({"alpha": 0}, "greater than 0"),
        ({"more": 1}, "Extra inputs"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Plan.model_validate(plan)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"begin": "09:30Z"}, "no offset"),
        ({"end": "16:00+01:00"}, "no offset"),
        ({"end": "09:30"}, "holds never"),
        ({"zone": "America/Nowhere"}, "no such time zone"),
        ({"zone": "../etc/passwd"}, "no such time zone"),
        ({"days": []}, "at least 1 item"),
    ],
)
def test_a_freeze_that_is_no_window_of_local_time_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Freeze.model_validate({**WINDOW, **change})


@pytest.mark.parametrize(
    ("now_s", "holds"),
    [
        (1793021399, False),  # Monday 2026-10-26 09:29:59 in New York, on daylight saving time
        (1793021400, True),
        (1793629799, False),  # Monday 2026-11-02 09:29:59, a week later without
        (1793629800, True),
        (1793653200, False),  # 16:00:00
    ],
)
def test_a_freeze_is_by_the_clock_on_the_wall_of_its_zone(now_s: int, holds: bool) -> None:
    assert Freeze.model_validate(WINDOW).holds(now_s) is holds
