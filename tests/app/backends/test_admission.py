"""Who is let in at which pace."""

from __future__ import annotations

import contextlib

import pytest

from app.backends.admission import SHORT_WAIT_S, Admission, Pace
from serve_app.contract import Overloaded


def admission(s_per_window: float, *, max_wait_s: float = 0.5) -> Admission:
    pace = Pace()
    pace.s_per_window = s_per_window
    return Admission(pace, max_group_windows=32, max_queued_windows=1024, max_wait_s=max_wait_s)


def longest_queue(subject: Admission, *, slots: int, budget_s: float = 2.0, flying: int = 0) -> int:
    """Most windows that may wait before a call of one."""

    def lets_in(ahead: int) -> bool:
        try:
            subject.refuse_overload(1, budget_s, ahead=ahead, queued=ahead, flying=flying, slots=slots)
        except Overloaded:
            return False
        return True

    return max(ahead for ahead in range(1025) if lets_in(ahead))


@pytest.mark.parametrize("slots", [1, 4, 8])
@pytest.mark.parametrize("s_per_window", [0.001, 0.002, 0.005, 0.01, 0.05])
def test_nobody_waits_longer_than_what_may_be_under_way_takes_but_for_a_short_while(
    s_per_window: float, slots: int
) -> None:
    subject = admission(s_per_window)
    way_s = s_per_window * slots * subject.group_windows(slots)
    wait_s = s_per_window * longest_queue(subject, slots=slots)
    assert wait_s <= max(way_s, SHORT_WAIT_S) + 1e-9
    assert wait_s > min(max(way_s, SHORT_WAIT_S), 0.5) - 1.01 * s_per_window


def test_the_slowest_backend_has_the_longest_wait_of_the_setting() -> None:
    assert longest_queue(admission(0.1), slots=1) == 5
    assert longest_queue(admission(0.1, max_wait_s=0.25), slots=1) == 2
    assert longest_queue(admission(0.001, max_wait_s=0.05), slots=1) == 50


@pytest.mark.parametrize(("ahead", "is_let_in"), [(50, True), (51, False)])
def test_what_another_arm_has_failed_may_wait_as_long_as_the_setting_allows(ahead: int, is_let_in: bool) -> None:
    refused = pytest.raises(Overloaded) if not is_let_in else contextlib.nullcontext()
    with refused:
        admission(0.01, max_wait_s=0.5).refuse_overload(
            1, 2.0, ahead=ahead, queued=ahead, flying=0, slots=1, is_last_resort=True
        )


def test_a_burst_of_a_quick_backend_is_no_overload() -> None:
    assert longest_queue(admission(0.0001), slots=1) == 1000


def test_before_a_pace_is_known_the_queue_is_bounded_by_its_size_alone() -> None:
    assert longest_queue(admission(0.0), slots=4) == 1023


def test_who_finds_nobody_ahead_is_let_in_however_slow_it_was() -> None:
    assert longest_queue(admission(10.0), slots=1) == 0


def test_a_deadline_must_leave_time_for_the_wait_and_for_what_is_under_way() -> None:
    assert longest_queue(admission(0.01), slots=4, budget_s=0.155, flying=10) == 5


def test_the_queue_holds_a_group_at_least() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        Admission(Pace(), max_group_windows=32, max_queued_windows=31, max_wait_s=0.5)
