"""How a rollout moves: each function takes the record in force and gives the next one, or refuses.

    start ─► running ─► (waiting ─►) running ─► … ─► done
                │ pause ⇄ resume
                ├─ breach, or rollback to the last good step ─► rolled_back
                └─ a share set by hand, or rollback to nothing ─► stopped

A start, a promotion and every step of the plan make the canary's share greater; the others never do. A step counts
as good once it was passed: by the controller, or before a manual gate. One that was promoted away from before does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from app.rollout.plan import ArmName, Plan, Step
from app.rollout.record import MAX_OVERRIDES, Phase, Record, Run


class MoveRefused(Exception):
    """The rollout does not stand where this move begins; the message says where it stands."""


class By(NamedTuple):
    """Who moves it, when, and why.

    Attributes:
        actor: Subject of the operator, or `controller`.
        at: Seconds since the epoch.
        reason: In words.
    """

    actor: str
    at: float
    reason: str = ""


def set_share(record: Record, share: float, by: By) -> Record:
    """Give the canary this share by hand; a plan that is being run stops there."""
    return _next(record, by, share=share, run=_ended(record.run, "stopped"))


def set_override(record: Record, account: str, share: float | None, by: By) -> Record:
    """Give one principal or tenant a share of its own, or the common one again."""
    overrides = {name: kept for name, kept in record.overrides.items() if name != account}
    if share is not None:
        if len(overrides) >= MAX_OVERRIDES:
            raise MoveRefused(f"at most {MAX_OVERRIDES} principals and tenants have shares of their own")
        overrides[account] = share
    return _next(record, by, overrides=overrides)


def start(record: Record, plan: Plan, run_id: str, by: By) -> Record:
    """Begin a plan at the first step whose share is not below the present one.

    Raises:
        MoveRefused: A plan is being run; its stable arm is not the one that serves; it ends below the present share;
            accounts have shares of their own of other arms.
    """
    if record.run is not None and record.run.active:
        raise MoveRefused(f"the plan {record.run.plan.name} is {record.run.phase}: let it end, or roll it back")
    share = present_share(record, plan)
    step = next((i for i, step in enumerate(plan.steps) if step.share >= share), None)
    if step is None:
        raise MoveRefused(f"the canary has a share of {share:g} already, more than the last step's")
    if record.overrides and (plan.stable, plan.canary) != (record.stable, record.canary):
        raise MoveRefused(f"shares of single accounts are of other arms, clear them first: {_some(record.overrides)}")
    # A share at which the plan begins anew is none that it has seen to be good: then nobody is what it goes back to.
    good = share if share < plan.steps[step].share else 0.0
    run = Run(id=run_id, plan=plan, phase="running", step=step, since=by.at, good=good)
    return _next(record, by, share=plan.steps[step].share, stable=plan.stable, canary=plan.canary, run=run)


def pause(record: Record, by: By) -> Record:
    """Stay at the present share; the guards go on being watched."""
    return _next(record, by, run=_in_phase(_active(record), "paused"))


def resume(record: Record, by: By) -> Record:
    """Go on after a pause; the step's time and samples begin anew, since a pause may be long."""
    run = _active(record)
    if run.phase != "paused":
        raise MoveRefused(f"the plan is {run.phase}, not paused")
    return _next(record, by, run=_entering(run, run.step, by.at))


def promote(record: Record, by: By, epoch: str | None = None) -> Record:
    """On to the next step without what is still awaited; from the last one, to the plan's end.

    Args:
        record: In force.
        by: Who promotes.
        epoch: Where the plan stood when that was decided; None for wherever it stands.

    Raises:
        MoveRefused: No plan is being run, or it has moved on since.
    """
    run = _active(record)
    if epoch not in (None, run.epoch):
        raise MoveRefused("the plan has moved on since: look where it stands, and promote again if it still shall")
    return _onward(record, by, is_passed=run.phase == "waiting")


def advance(record: Record, by: By) -> Record:
    """On to the next step, as this one is passed; from the last one, to the plan's end."""
    return _onward(record, by, is_passed=True)


def wait(record: Record, by: By) -> Record:
    """All that the step asks for was seen, and its gate is somebody's to open."""
    return _next(record, by, run=_in_phase(_active(record), "waiting"))


def finish(record: Record, by: By, findings: Sequence[str]) -> Record:
    """The last step is passed: its share stays."""
    return _next(record, by, run=_ended(_active(record), "done", findings))


def breach(record: Record, by: By, findings: Sequence[str]) -> Record:
    """A guard was broken: back to the last good step at once."""
    run = _active(record)
    return _next(record, by, share=min(run.good, record.share), run=_ended(run, "rolled_back", findings))


def roll_back(record: Record, by: By) -> Record:
    """Nobody on the canary any more, whatever is being run. Always possible; shares of single principals go too."""
    run = _ended(record.run, "rolled_back")
    if run is not None and run.phase == "done":
        run = _in_phase(run, "rolled_back")  # it is undone
    return _next(record, by, share=0.0, overrides={}, run=run)


def roll_back_to_legacy(record: Record, by: By) -> Record:
    """Everybody on legacy, whatever the arms were: the way back from Ray Serve."""
    arms = {"stable": ArmName(backend="legacy"), "canary": ArmName(backend="ray_serve")}
    return roll_back(record, by).model_copy(update=arms)


def present_share(record: Record, plan: Plan) -> float:
    """The share that the plan's canary has now. Raises `MoveRefused` where its stable arm is not who serves."""
    if _names(plan.stable, record.stable) and plan.canary == record.canary:
        return record.share
    serving = record.canary if record.share == 1.0 else record.stable
    if record.share not in (0.0, 1.0) or not _names(plan.stable, serving):
        raise MoveRefused(
            f"{record.canary.arm()} has a share of {record.share:g} and {record.stable.arm()} the rest: "
            f"a plan from {plan.stable.arm()} to {plan.canary.arm()} cannot begin there"
        )
    return 0.0


def step_in_force(record: Record) -> Step:
    """The step at which the plan stands. Raises `MoveRefused` where none is being run."""
    run = _active(record)
    return run.plan.steps[run.step]


def plan_in_force(record: Record) -> Plan:
    """The plan that is being run. Raises `MoveRefused` where none is."""
    return _active(record).plan


def grows(old: Record, new: Record) -> bool:
    """Whether the change moves anybody to a canary, so that it may wait for a better moment."""
    if new.share == 0 and not any(new.overrides.values()):
        return False  # nobody is on it, whichever it is
    same_arms = (old.stable, old.canary) == (new.stable, new.canary)
    callers = [caller for account in old.overrides.keys() | new.overrides.keys() for caller in _callers_of(account)]
    return (
        not same_arms
        or new.share > old.share
        or any(new.share_of(accounts) > old.share_of(accounts) for accounts in callers)
    )


def _callers_of(account: str) -> tuple[tuple[str, ...], ...]:
    """Accounts, the closer first, of those whom an account's share is for: `sub:A/B` may be A/B, or B of tenant A."""
    kind, _, name = account.partition(":")
    tenant, slash, _ = name.partition("/")
    return ((account,), (account, f"tenant:{tenant}")) if kind == "sub" and slash else ((account,),)


def _names(arm: ArmName, serving: ArmName) -> bool:
    """Whether the arm is the one that serves; it may name the version of one that serves whichever it has."""
    return arm == serving or (arm.backend == serving.backend and serving.version is None)


def _some(accounts: Iterable[str]) -> str:
    """The first few of them."""
    first, *others = sorted(accounts)
    return f"{first} and {len(others)} more" if others else first


def _active(record: Record) -> Run:
    if record.run is None or not record.run.active:
        raise MoveRefused("no plan is being run")
    return record.run


def _onward(record: Record, by: By, *, is_passed: bool) -> Record:
    run = _active(record)
    if run.step + 1 == len(run.plan.steps):
        return finish(record, by, ())
    if is_passed:
        run = run.model_copy(update={"good": record.share})
    step = run.step + 1
    return _next(record, by, share=run.plan.steps[step].share, run=_entering(run, step, by.at))


def _entering(run: Run, step: int, at: float) -> Run:
    return run.model_copy(update={"phase": "running", "step": step, "entered": run.entered + 1, "since": at})


def _in_phase(run: Run, phase: Phase) -> Run:
    return run.model_copy(update={"phase": phase})


def _ended(run: Run | None, phase: Phase, findings: Sequence[str] = ()) -> Run | None:
    """An ended run keeps its end."""
    if run is None or not run.active:
        return run
    return run.model_copy(update={"phase": phase, "findings": tuple(findings)})


def _next(record: Record, by: By, **changes: object) -> Record:
    return Record.model_validate(
        {**dict(record), **changes, "changed_at": by.at, "changed_by": by.actor, "reason": by.reason}
    )
