"""How many replicas: one table of profiles, and the policy that Ray's controller runs. Pure functions, no Ray import.

Calls to replicas carry whole groups of windows, so counting calls would hide the load. Replicas report the windows
they hold (`WINDOWS_ONGOING`), and `scale_on_windows` reads those reports. `target_ongoing_requests` keeps Serve's name
and counts windows: waiting and running, per replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

WINDOWS_ONGOING = "windows_ongoing"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(gt=0)]

ProfileName = Literal["deployment", "trading", "market_hours", "off_hours", "stress_test", "local"]


class Profile(BaseModel):
    """Bounds and tempo of scaling, named as Serve names them; unknown and outdated names are refused.

    `metrics_interval_s`, at which replicas and handles report, is announced as outdated; but the environment variables
    that shall replace it are read and not used in Ray 2.60.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_replicas: Count
    max_replicas: Count
    target_ongoing_requests: Annotated[float, Field(gt=0)]
    upscale_delay_s: Seconds
    downscale_delay_s: Seconds
    upscaling_factor: Factor
    downscaling_factor: Factor
    metrics_interval_s: Seconds
    look_back_period_s: Seconds

    @model_validator(mode="after")
    def _figures_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not be above max_replicas")
        if self.metrics_interval_s >= self.look_back_period_s:
            raise ValueError("metrics_interval_s must be below look_back_period_s: an average needs a report in it")
        return self

    def autoscaling_config(self) -> dict[str, Any]:
        """The `autoscaling_config` of a Serve deployment, with the policy that counts windows."""
        return {**self.model_dump(), "policy": {"policy_function": f"{__name__}:{scale_on_windows.__name__}"}}


def _profile(replicas: tuple[int, int], target: float, delays_s: tuple[float, float], factors: tuple[float, float],
             reports_s: tuple[float, float]) -> Profile:  # fmt: skip
    return Profile(
        min_replicas=replicas[0],
        max_replicas=replicas[1],
        target_ongoing_requests=target,
        upscale_delay_s=delays_s[0],
        downscale_delay_s=delays_s[1],
        upscaling_factor=factors[0],
        downscaling_factor=factors[1],
        metrics_interval_s=reports_s[0],
        look_back_period_s=reports_s[1],
    )


# A look-back longer than a delay makes the count swing: the new replicas are judged by load from before they came.
# Only `trading` has one, because its tempo was chosen by those who run it.
PROFILES: Mapping[ProfileName, Profile] = {
    #                        replicas   target  delays up, down   factors     reports every, look-back
    "deployment":   _profile((2, 10),   5.0,    (30.0, 60.0),     (1.0, 0.5), (10.0, 30.0)),
    "trading":      _profile((2, 20),   5.0,    (30.0, 300.0),    (1.0, 0.5), (10.0, 120.0)),
    "market_hours": _profile((5, 30),   3.0,    (15.0, 120.0),    (1.5, 0.3), (3.0, 15.0)),
    "off_hours":    _profile((2, 10),   10.0,   (60.0, 300.0),    (1.0, 0.5), (10.0, 30.0)),
    "stress_test":  _profile((10, 50),  2.0,    (5.0, 60.0),      (2.0, 0.1), (1.0, 5.0)),
    # One machine: a second replica only when the first always has a full group waiting behind the running one.
    "local":        _profile((1, 2),    64.0,   (5.0, 60.0),      (1.0, 0.5), (1.0, 5.0)),
}  # fmt: skip


class _Bounds(Protocol):
    target_ongoing_requests: float


class Load(Protocol):
    """What the policy reads of Serve's `AutoscalingContext`."""

    target_num_replicas: int
    config: _Bounds

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


def scale_on_windows(load: Load) -> tuple[float, dict[str, Any]]:
    """Ask for as many replicas as hold the target number of windows each.

    Serve applies factors, delays and bounds to the answer. It calls this ten times a second inside its controller,
    where an exception would stop the updates of every application: so this never raises, and without reports, or
    with unreadable ones, the count stays as it is.

    Returns:
        Replicas wanted, not rounded, and an empty state.
    """
    try:
        reports = (load.aggregated_metrics or {}).get(WINDOWS_ONGOING)
        if not reports:
            return load.target_num_replicas, {}
        return sum(reports.values()) / load.config.target_ongoing_requests, {}
    except Exception:  # any bug here would be everybody's outage
        return load.target_num_replicas, {}
