"""A rollout's plan: which arm is to take over from which, in what steps, and what must hold meanwhile."""

from __future__ import annotations

from datetime import datetime, time
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from app.backends.base import Arm

MAX_STEPS = 20
MAX_FREEZES = 20

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
ShareOfCallers = Annotated[float, Field(ge=0, le=1)]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

# What a guard may watch: for each, a request of an arm counts as bad or good.
Signal = Literal["errors", "invalid", "slow", "disagreement", "class_mix", "regression"]

# What only a shadow shows; of these, what is between the two answers and has no rate of the stable arm.
_SHADOWED: frozenset[Signal] = frozenset(("disagreement", "class_mix", "regression"))
_BETWEEN: frozenset[Signal] = frozenset(("disagreement", "regression"))

_WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Guard(_Part):
    """A promise about the canary: its rate of bad answers is at most `ratio` times the stable arm's, plus `slack`.

    Attributes:
        signal: What counts as bad. `errors`: the arm gave no answer. `invalid`: its model's output was withheld.
            `slow`: a stable answer took longer than the stable arm's p50 (and than its p90, and than its p99: each is
            judged), a canary answer longer than that and what `stretch` and `allowance_s` forgive. `disagreement`: in
            the shadow, the arms chose different classes for the same window. `class_mix`: the arm chose a class (each
            is judged) in the shadow, for the same windows. `regression`: in the shadow, the expected returns for the
            same window are further apart than 1.64 of their combined standard deviations.
        ratio: Factor on the stable arm's rate, 0 for a bound that does not look at the stable arm.
        slack: Rate, 0..1, that is added.
        stretch: Of `slow` alone: the canary may take this many times as long.
        allowance_s: Of `slow` alone: or this many seconds longer, if that is more.
    """

    signal: Signal
    ratio: Annotated[float, Field(ge=0, le=100)] = 1.0
    slack: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stretch: Annotated[float, Field(ge=1, le=100)] = 1.0
    allowance_s: Annotated[float, Field(ge=0, le=60)] = 0.0

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.ratio == 0 and self.slack == 0:
            raise ValueError("a guard with neither ratio nor slack allows nothing at all")
        if self.signal in _BETWEEN and self.ratio != 0:
            raise ValueError(f"{self.signal} is between the arms and has no stable rate: set ratio = 0 and a slack")
        if self.signal != "slow" and (self.stretch != 1 or self.allowance_s != 0):
            raise ValueError("stretch and allowance_s are for the guard on slow answers")
        if self.signal == "slow" and self.ratio == 0:
            raise ValueError("slow is by the stable arm's latency: set a ratio")
        return self


class Step(_Part):
    """One share, and what must have been seen at it before the next.

    Attributes:
        share: Share of callers on the canary, 0..1.
        hold_s: Seconds to stay at least.
        samples: Requests that the canary must have answered meanwhile.
        gate: `auto` goes on by itself; `manual` waits for somebody to promote.
    """

    share: ShareOfCallers
    hold_s: Annotated[float, Field(ge=0, le=30 * 86_400)] = 60.0
    samples: Annotated[int, Field(ge=0, le=10_000_000)] = 200
    gate: Literal["auto", "manual"] = "auto"


class Freeze(_Part):
    """A window of the week in which no share grows by itself; who promotes by hand, or rolls back, may do so.

    Attributes:
        days: On which it holds; of a window over midnight, the days on which it begins.
        begin: Local time, included.
        end: Local time, excluded; earlier than `begin` for a window over midnight.
        zone: IANA name of the time zone.
    """

    days: Annotated[tuple[Weekday, ...], Field(min_length=1, max_length=7)] = ("mon", "tue", "wed", "thu", "fri")
    begin: time
    end: time
    zone: Annotated[str, Field(max_length=64)] = "America/New_York"

    @field_validator("zone")
    @classmethod
    def _is_known(cls, zone: str) -> str:
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("no such time zone") from None
        return zone

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.begin.tzinfo is not None or self.end.tzinfo is not None:
            raise ValueError("begin and end are local times of the zone: give them no offset")
        if self.begin == self.end:
            raise ValueError("begin and end are the same: such a window holds never")
        return self

    def holds(self, now_s: float) -> bool:
        """Whether it holds at `now_s` seconds since the epoch."""
        now = datetime.fromtimestamp(now_s, ZoneInfo(self.zone))
        today, yesterday = _WEEKDAYS[now.weekday()], _WEEKDAYS[now.weekday() - 1]
        clock = now.time()
        if self.begin <= self.end:
            return today in self.days and self.begin <= clock < self.end
        return (today in self.days and clock >= self.begin) or (yesterday in self.days and clock < self.end)


class ArmName(_Part):
    """A backend, and a version of the model where it is not the backend's own choice."""

    backend: Literal["ray_serve", "legacy"]
    version: Name | None = None

    def arm(self) -> Arm:
        return Arm(self.backend, self.version)


DEFAULT_STEPS = tuple(Step(share=share) for share in (0.01, 0.05, 0.25, 0.5, 1.0))

# What any rollout must keep. A model's invalid answers are promised below one in a thousand. The canary may take a
# fifth or 20 ms longer than the stable arm: on two busy cores the way to Ray Serve is 4 ms longer at the median and 8
# at p90 than that to a model in the gateway's own process, and with 5 ms sound migrations were ended. As a tenth of the
# stable arm's answers take longer than its p90, a quarter more than a tenth of the canary's may take longer than p90
# and what is forgiven.
DEFAULT_GUARDS = (
    Guard(signal="errors", ratio=1.0, slack=0.002),
    Guard(signal="invalid", ratio=0.0, slack=0.001),
    Guard(signal="slow", ratio=1.25, slack=0.01, stretch=1.2, allowance_s=0.02),
)


class Plan(_Part):
    """A whole rollout.

    Attributes:
        name: For people, and the audit log.
        stable: The arm that serves now, and to which a breach goes back.
        canary: The arm that is to take over.
        steps: Their shares grow.
        guards: All hold at every step, or the share goes back to the last good step.
        alpha: Chance, over the whole plan, that a canary which keeps every guard is rolled back all the same.
        shadow: Share of requests that the other arm answers too, unseen by the caller, 0..1.
        experiment: Whether assignments and predictions are kept, to be joined with what the market did.
        freezes: When no share grows by itself.
    """

    name: Name = "rollout"
    stable: ArmName = ArmName(backend="legacy")
    canary: ArmName = ArmName(backend="ray_serve")
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=MAX_STEPS)] = DEFAULT_STEPS
    guards: Annotated[tuple[Guard, ...], Field(max_length=10)] = DEFAULT_GUARDS
    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    shadow: ShareOfCallers = 0.0
    experiment: bool = False
    freezes: Annotated[tuple[Freeze, ...], Field(max_length=MAX_FREEZES)] = ()

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        shares = [step.share for step in self.steps]
        if shares != sorted(set(shares)):
            raise ValueError("the steps' shares must grow")
        if self.stable == self.canary:
            raise ValueError("stable and canary are the same arm")
        signals = [guard.signal for guard in self.guards]
        if len(signals) != len(set(signals)):
            raise ValueError("one guard per signal")
        if self.shadow == 0 and (unseen := _SHADOWED & set(signals)):
            raise ValueError(f"guards on {' and '.join(sorted(unseen))} need a shadow")
        return self

    def frozen(self, now_s: float) -> bool:
        """Whether some freeze holds at `now_s` seconds since the epoch."""
        return any(freeze.holds(now_s) for freeze in self.freezes)
