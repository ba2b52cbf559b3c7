"""The rollout for people: `GET /rollout` as a table."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from app.rollout.plan import Plan
from app.rollout.record import ACTIVE

_PATIENCE_S = 10.0  # a canary that nobody has asked for so long may have no callers at all
_NO_CALLERS = (
    "The canary has answered nobody at this step: with few callers a small share may hold none of them. "
    "`sluice rollout promote` goes on, `sluice rollout set 1 --account sub:NAME` moves one caller."
)


class Progress(NamedTuple):
    """How far a plan is.

    Attributes:
        phase: Of the run.
        step: In force or the last one, from 1.
        steps: Of the plan.
        share: The canary's, 0..1.
        held_s: Seconds since the step was entered.
        hold_s: Seconds that it stays at least.
        samples: Requests that the canary has answered at this step.
        needed: Requests that it must answer.
        manual: Whether the next step waits for somebody to promote.
        frozen: Whether a freeze keeps every share from growing now.
        active: Whether the plan has not ended.
        guards: A sentence for each.
    """

    phase: str
    step: int
    steps: int
    share: float
    held_s: float
    hold_s: float
    samples: int
    needed: int
    manual: bool
    frozen: bool
    active: bool
    guards: tuple[str, ...]

    @property
    def lacks_callers(self) -> bool:
        is_silent = self.phase == "running" and not self.samples and self.held_s >= _PATIENCE_S
        return is_silent and self.needed > 0 and self.share < 1

    def line(self) -> str:
        """All of it but the guards in one line."""
        phase = self.phase.replace("_", " ")
        text = f"step {self.step} of {self.steps}, {phase}: {100 * self.share:.4g} % of the callers"
        if not self.active:
            return text
        gate = ", then by hand" if self.manual else ""
        if self.frozen:
            gate += "; a freeze holds"
        return f"{text}, {self.held_s:.0f} of {self.hold_s:.0f} s, {self.samples:,} of {self.needed:,} samples{gate}"


def progress(document: dict[str, Any], now_s: float) -> Progress | None:
    """How far the plan is; None where there was none.

    Args:
        document: What `GET /rollout` answered.
        now_s: Seconds since the epoch.
    """
    run = document["run"]
    if run is None:
        return None
    step = run["plan"]["steps"][run["step"]]
    judged = document["judgement"] or {}
    is_of_step = judged.get("epoch") == f"{run['id']}.{run['entered']}"
    sentences = [f"{guard['signal']}: {guard['sentence']}" for guard in judged.get("guards") or []]
    return Progress(
        phase=run["phase"],
        step=run["step"] + 1,
        steps=len(run["plan"]["steps"]),
        share=document["share"],
        held_s=max(0.0, now_s - run["since"]),
        hold_s=step["hold_s"],
        samples=judged["samples"] if is_of_step else 0,
        needed=step["samples"],
        manual=step["gate"] == "manual",
        frozen=Plan.model_validate(run["plan"]).frozen(now_s),
        active=run["phase"] in ACTIVE,
        guards=tuple(sentences or run["findings"]),
    )


def render(document: dict[str, Any], now_s: float) -> Group:
    """What is in force, by whom and why; of a plan, how far it is and what its guards have seen."""
    table = Table.grid(padding=(0, 2))
    for name, text in (*_in_force(document), *_of_plan(document, now_s)):
        table.add_row(Text(name, style="dim"), Text(text))
    stands = progress(document, now_s)
    return Group(table, Text(_NO_CALLERS)) if stands is not None and stands.lacks_callers else Group(table)


def _in_force(document: dict[str, Any]) -> list[tuple[str, str]]:
    share = document["share"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(document["changed_at"]))
    rows = [
        ("canary", f"{document['canary']} {share:.2%}"),
        ("stable", f"{document['stable']} {1 - share:.2%}"),
        ("set by", f"{document['changed_by']} on {when}"),
    ]
    if document["reason"]:
        rows.append(("because", document["reason"]))
    rows += [("apart", f"{account} {own:.2%}") for account, own in document["overrides"].items()]
    return rows


def _of_plan(document: dict[str, Any], now_s: float) -> list[tuple[str, str]]:
    stands = progress(document, now_s)
    if stands is None:
        return []
    rows = [("plan", document["run"]["plan"]["name"]), ("stands", stands.line())]
    return rows + [("guard", sentence) for sentence in stands.guards]
