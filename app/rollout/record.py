"""The rollout's record: which arms there are, who gets which, and the plan that is being run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.backends.base import Arm
from app.rollout.evidence import Side
from app.rollout.plan import ArmName, Plan, ShareOfCallers

MAX_OVERRIDES = 1000
MAX_REASON_CHARS = 500

# Whose share is set apart: a principal's account or a tenant, as `Principal` writes them.
Account = Annotated[str, Field(max_length=300, pattern=r"^(sub|tenant):[^\x00-\x1f\x7f]+$")]
Reason = Annotated[str, Field(max_length=MAX_REASON_CHARS)]

# `running` goes on by itself; `waiting` stands before a manual gate; the last three are ends.
Phase = Literal["running", "waiting", "paused", "done", "rolled_back", "stopped"]
PHASES: tuple[Phase, ...] = get_args(Phase)
ACTIVE: tuple[Phase, ...] = ("running", "waiting", "paused")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(_Part):
    """A plan on its way.

    Attributes:
        id: Of this start, for evidence, audit log and webhook.
        plan: What is done.
        phase: Where it stands.
        step: Index of the step that is in force, or was last.
        entered: How many steps were entered so far; evidence is counted apart for each.
        since: When the step was entered, seconds since the epoch.
        good: Share to which a breach goes back: that of the last step which was passed, or of before the start.
        findings: What the judge had found when the run ended, a sentence for each guard.
    """

    id: Annotated[str, Field(min_length=1, max_length=40)]
    plan: Plan
    phase: Phase
    step: Annotated[int, Field(ge=0)] = 0
    entered: Annotated[int, Field(ge=1)] = 1
    since: float
    good: ShareOfCallers
    findings: Annotated[tuple[Annotated[str, Field(max_length=300)], ...], Field(max_length=40)] = ()

    @property
    def active(self) -> bool:
        return self.phase in ACTIVE

    @property
    def epoch(self) -> str:
        """Name of the evidence that is gathered now."""
        return f"{self.id}.{self.entered}"

    @model_validator(mode="after")
    def _is_at_a_step(self) -> Self:
        if self.step >= len(self.plan.steps) or not math.isfinite(self.since):
            raise ValueError("not at a step of its plan")
        return self


class Record(_Part):
    """What is in force. The share is the canary's; the stable arm has the rest.

    Attributes:
        share: Share of callers on the canary, 0..1.
        stable: The arm that serves those who were not moved.
        canary: The arm to which callers are moved.
        overrides: Shares of single principals or tenants instead of the common one.
        changed_at: Seconds since the epoch, by the wall clock.
        changed_by: Full name of who changed it, `controller`, or `settings` for the first.
        reason: Why, in the words of who changed it.
        run: The plan that is run, or was last.
    """

    share: ShareOfCallers
    stable: ArmName = ArmName(backend="legacy")
    canary: ArmName = ArmName(backend="ray_serve")
    overrides: Annotated[dict[Account, ShareOfCallers], Field(max_length=MAX_OVERRIDES)] = {}
    changed_at: float
    changed_by: Annotated[str, Field(max_length=600)]
    reason: Reason = ""
    run: Run | None = None

    def arm(self, side: Side) -> Arm:
        return (self.canary if side == "canary" else self.stable).arm()

    @property
    def epoch(self) -> str | None:
        """Name of the evidence that is gathered now, None where none is."""
        return self.run.epoch if self.run is not None and self.run.active else None

    def share_of(self, accounts: Sequence[str]) -> float:
        """The canary's share among callers of the first account that has one of its own, or the common share."""
        if self.overrides:
            for account in accounts:
                if account in self.overrides:
                    return self.overrides[account]
        return self.share

    @property
    def ray_serve_share(self) -> float:
        """Share of callers whose arm is on Ray Serve, 0..1, those with shares of their own left out."""
        on_ray = {True: 1.0, False: 0.0}
        canary, stable = (on_ray[arm.backend == "ray_serve"] for arm in (self.canary, self.stable))
        return self.share * canary + (1 - self.share) * stable

    def summary(self) -> dict[str, Any]:
        """What matters of it in the audit log and to a webhook, JSON-ready; plan and accounts by name and number."""
        summary: dict[str, Any] = {
            "share": self.share,
            "stable": str(self.stable.arm()),
            "canary": str(self.canary.arm()),
            "overrides": len(self.overrides),
        }
        if self.run is not None:
            run = self.run
            summary["run"] = {
                "id": run.id,
                "plan": run.plan.name,
                "phase": run.phase,
                "step": run.step,
                "good": run.good,
            }
        return summary

    def document(self) -> dict[str, Any]:
        """JSON-ready, as `parse_record` reads it."""
        return self.model_dump(mode="json")


def parse_record(document: dict[str, Any]) -> Record:
    """Read a stored record, also one of the days when there was but a share. Raises `ValueError`."""
    if "ray_serve_fraction" in document:
        document = {"share" if name == "ray_serve_fraction" else name: value for name, value in document.items()}
    try:
        record = Record.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise ValueError("not a stored rollout") from error
    if not math.isfinite(record.changed_at):
        raise ValueError("not a stored rollout")
    return record
