from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.autoscaling import PROFILES, WINDOWS_ONGOING, Profile, scale_on_windows

PLAIN = PROFILES["deployment"].model_dump()


@dataclass
class FakeLoad:
    """What Serve's context tells a policy."""

    aggregated_metrics: Any
    target_num_replicas: int = 3
    config: Any = field(default_factory=lambda: PROFILES["trading"])


def reports(*windows: float) -> dict[str, dict[str, float]]:
    return {WINDOWS_ONGOING: {f"replica{i}": value for i, value in enumerate(windows)}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # min, max, target, up s, down s, up factor, down factor
        ("deployment", (2, 10, 5, 30, 60, 1.0, 0.5)),
        ("trading", (2, 20, 5, 30, 300, 1.0, 0.5)),
        ("market_hours", (5, 30, 3, 15, 120, 1.5, 0.3)),
        ("off_hours", (2, 10, 10, 60, 300, 1.0, 0.5)),
        ("stress_test", (10, 50, 2, 5, 60, 2.0, 0.1)),
    ],
)
def test_profiles_keep_the_figures_they_were_specified_with(name: Any, expected: tuple[float, ...]) -> None:
    assert tuple(PROFILES[name].model_dump().values())[:7] == expected


def test_the_trading_profile_keeps_its_reports_and_look_back() -> None:
    assert (PROFILES["trading"].metrics_interval_s, PROFILES["trading"].look_back_period_s) == (10, 120)


def test_only_the_trading_profile_looks_back_longer_than_it_waits() -> None:
    assert [
        name for name, p in PROFILES.items() if p.look_back_period_s > min(p.upscale_delay_s, p.downscale_delay_s)
    ] == ["trading"]


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_replicas_report_several_times_within_a_delay(name: Any) -> None:
    assert PROFILES[name].upscale_delay_s >= 3 * PROFILES[name].metrics_interval_s


@pytest.mark.parametrize(
    "change",
    [
        {"target_num_ongoing_requests_per_replica": 5},
        {"upscale_smoothing_factor": 1.0},
        {"metrics_interval_s": 30.0},
        {"min_replicas": 11},
        {"min_replicas": 0},
        {"target_ongoing_requests": 0.0},
        {"upscale_delay_s": "30"},
    ],
)
def test_a_profile_refuses_outdated_names_and_impossible_values(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Profile(**{**PLAIN, **change})


def test_replicas_wanted_are_all_windows_over_the_target() -> None:
    assert scale_on_windows(FakeLoad(reports(10.0, 20.0))) == (30 / 5, {})
    assert scale_on_windows(FakeLoad(reports(0.0, 0.0))) == (0, {})


@pytest.mark.parametrize("nothing", [None, {}, {WINDOWS_ONGOING: {}}, {"other": {"replica": 9.0}}])
def test_without_reports_the_count_stays(nothing: Any) -> None:
    assert scale_on_windows(FakeLoad(nothing)) == (3, {})


@given(
    st.recursive(st.none() | st.text() | st.floats(), lambda inner: st.dictionaries(st.just(WINDOWS_ONGOING), inner))
)
def test_the_policy_never_raises(garbage: Any) -> None:
    scale_on_windows(FakeLoad(garbage))
    scale_on_windows(FakeLoad(reports(1.0), config=garbage))
