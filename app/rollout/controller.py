"""Runs a plan: looks at the evidence, and moves the share when the plan, the judge or a freeze says so.

    evidence of all workers ─► judge ─► decide ─► Rollout.change ─► everybody's record, audit log, webhook

One controller of all workers and gateways acts at a time. What it has judged is kept in the store, so that another one
goes on where it ended. While the store is away nothing is judged and shares stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from app.rollout import moves
from app.rollout.audit import Action
from app.rollout.evidence import Evidence
from app.rollout.gathering import EvidenceAway, Pool
from app.rollout.judge import Judge, Verdict
from app.rollout.lease import Lease
from app.rollout.moves import By, MoveRefused
from app.rollout.record import Record, Run
from app.rollout.rollout import NotStored, Rollout
from app.rollout.state import StateAway, StateConflict, StateStore, StateUnreadable

_LOGGER = logging.getLogger(__name__)

DOCUMENT = "judgement"
ACTOR = "controller"
PERIOD_S = 0.25
_KEEP_PERIOD_S = 1.0


class Decision(NamedTuple):
    """A move that is due.

    Attributes:
        action: What it is called.
        move: From the record on which it was decided to the next one.
        reason: Why, for the audit log.
    """

    action: Action
    move: Callable[[Record, By], Record]
    reason: str


def decide(record: Record, verdicts: list[Verdict], samples: int, now_s: float) -> Decision | None:
    """What is to be done now; None for nothing.

    Args:
        record: In force.
        verdicts: Of each guard.
        samples: Requests that the canary has answered or failed at this step.
        now_s: Seconds since the epoch.
    """
    broken = next((verdict for verdict in verdicts if verdict.breached), None)
    if broken is not None and record.run is not None and record.run.active:
        findings = [verdict.sentence for verdict in verdicts]
        return Decision("rollback", lambda r, by: moves.breach(r, by, findings), broken.sentence)
    return _onward(record, verdicts, samples, now_s) if _is_passed(record, samples, now_s) else None


def _onward(record: Record, verdicts: list[Verdict], samples: int, now_s: float) -> Decision | None:
    """What is to be done with a step that has had its time and its samples, and no guard broken."""
    step, plan = moves.step_in_force(record), moves.plan_in_force(record)
    unjudged = [verdict.signal for verdict in verdicts if not verdict.is_known] if step.samples else []
    if step.gate == "manual":
        return Decision("pause", moves.wait, "the step is passed, and its gate is opened by hand")
    if unjudged and record.share == 1:  # a stable arm without callers will not answer more
        return Decision("pause", moves.wait, f"nothing was seen to judge {', '.join(unjudged)} by: promote by hand")
    if unjudged or plan.frozen(now_s):
        return None
    if step is plan.steps[-1]:
        findings = [verdict.sentence for verdict in verdicts]
        return Decision("finish", lambda r, by: moves.finish(r, by, findings), "every step is passed")
    return Decision("step", moves.advance, f"the canary was asked {samples} times, and every guard is kept")


def _is_passed(record: Record, samples: int, now_s: float) -> bool:
    """Whether all was seen that the step asks for."""
    run = record.run
    if run is None or run.phase != "running":
        return False
    step = run.plan.steps[run.step]
    return now_s - run.since >= step.hold_s and samples >= step.samples


@dataclass(slots=True)
class Course:
    """What a controller knows of the run that it controls.

    Attributes:
        run_id: Of the run.
        epoch: Whose evidence was read last.
        judge: Of the whole run.
        seen: Evidence of the epoch that was judged.
        samples: Requests that the canary has answered in the epoch.
    """

    run_id: str
    epoch: str
    judge: Judge
    seen: Evidence = field(default_factory=Evidence)
    samples: int = 0

    def see(self, epoch: str, total: Evidence) -> None:
        """Judge what came since the last time."""
        if epoch != self.epoch:
            self.epoch, self.seen, self.samples = epoch, Evidence(), 0
        if any(total[name] < self.seen[name] for name in self.seen):
            self.seen = total  # what held the pool came back without what it was told last: some may be in twice
        batch = total.since(self.seen)
        self.judge.see(batch)
        self.samples += batch["canary_requests"]
        self.seen = total

    def to_document(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "epoch": self.epoch,
            "seen": self.seen.counts,
            "samples": self.samples,
            "judge": self.judge.to_document(),
            "guards": [asdict(verdict) for verdict in self.judge.verdicts()],
        }

    @classmethod
    def from_document(cls, run: Run, document: dict[str, Any]) -> Course:
        """Raises KeyError, TypeError, ValueError for what is no course of this run."""
        if document["run"] != run.id:
            raise ValueError("of another run")
        judge = Judge.from_document(run.plan.guards, run.plan.alpha, document["judge"])
        return cls(run.id, str(document["epoch"]), judge, Evidence(document["seen"]), int(document["samples"]))


class Controller:
    """Runs the plan that the record holds.

    Args:
        rollout: Whose record it moves.
        pool: Evidence of all workers.
        lease: Whether this controller is the one that acts.
        store: Where what was judged is kept.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self, rollout: Rollout, pool: Pool, lease: Lease, store: StateStore, *, wall_clock: Callable[[], float]
    ) -> None:
        self._rollout = rollout
        self._pool = pool
        self._lease = lease
        self._store = store
        self._wall_clock = wall_clock
        self._course: Course | None = None
        self._version = 0
        self._kept_at = 0.0
        self._holding = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._keep_ticking())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._lease.release()
        await self._store.close()

    async def findings(self) -> dict[str, Any] | None:
        """What was judged of the present plan or the last one, by whichever controller did it; None before that."""
        run = self._rollout.record.run
        try:
            stored = await self._store.read(DOCUMENT)
        except (StateAway, StateUnreadable, OSError):
            return None
        if run is None or stored is None or stored.document.get("run") != run.id:
            return None
        return {name: stored.document.get(name) for name in ("epoch", "samples", "guards")}

    async def tick(self) -> None:
        """Look once, and do what is due.

        Raises:
            EvidenceAway, StateAway, StateConflict, StateUnreadable, MoveRefused, NotStored, OSError: Nothing is lost by
                looking again.
        """
        record = self._rollout.record
        run = record.run
        if run is None or not run.active:
            await self._rest()
            return
        self._holding = await self._lease.hold()
        if not self._holding:
            self._course = None  # somebody else judges on; what they find is read from the store
            return
        if self._course is None or self._course.run_id != run.id:
            self._course = await self._take_over(run)
        self._course.see(run.epoch, await self._pool.total(run.epoch))
        now = self._wall_clock()
        decision = decide(record, self._course.judge.verdicts(), self._course.samples, now)
        is_due = now - self._kept_at >= _KEEP_PERIOD_S or now < self._kept_at
        try:
            if decision is not None:
                await self._do(decision, record, now)  # before anything that a slow disk may hold up
                is_due = True
        finally:
            if is_due:  # what was judged outlives a move that could not be made
                await self._keep(now)

    async def _rest(self) -> None:
        if self._holding:
            self._holding, self._course = False, None
            await self._lease.release()

    async def _take_over(self, run: Run) -> Course:
        stored = await self._store.read(DOCUMENT)
        self._version = 0 if stored is None else stored.version
        try:
            if stored is not None:
                return Course.from_document(run, stored.document)
        except (KeyError, TypeError, ValueError):
            _LOGGER.info("the plan %s is judged from now on", run.id)
        return Course(run.id, run.epoch, Judge(run.plan.guards, run.plan.alpha))

    async def _keep(self, now_s: float) -> None:
        assert self._course is not None, "kept while it is controlled"
        self._kept_at = now_s
        try:
            await self._store.write(DOCUMENT, self._course.to_document(), self._version + 1)
        except OSError as error:  # it is for those who come after
            _LOGGER.warning("what was judged could not be kept: %s", error.strerror)
            return
        except StateConflict:  # another controller has judged meanwhile
            self._course = None
            raise
        self._version += 1

    async def _do(self, decision: Decision, decided_on: Record, now_s: float) -> None:
        """Make the move, unless what it was decided on is in force no more."""
        by = By(ACTOR, now_s, decision.reason)

        def move(record: Record) -> Record:
            if record.run is None or decided_on.run is None:
                raise MoveRefused("the plan has ended")
            if (record.run.epoch, record.run.phase) != (decided_on.run.epoch, decided_on.run.phase):
                raise MoveRefused("the plan has moved on")
            return decision.move(record, by)

        assert self._course is not None, "decided by what was judged"
        guards = [asdict(verdict) for verdict in self._course.judge.verdicts()]
        await self._rollout.change(move, decision.action, {"guards": guards, "samples": self._course.samples})

    async def _keep_ticking(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(PERIOD_S)
            fault = ""
            try:
                await self.tick()
            except (EvidenceAway, StateAway, StateConflict, StateUnreadable, MoveRefused, NotStored, OSError) as error:
                fault = f"{type(error).__name__}: {error}"
            except Exception:
                _LOGGER.exception("the plan stands still, for a reason that was not foreseen")
            if fault and fault != told:  # once, and not four times a second
                _LOGGER.warning("the plan stands still: %s", fault)
            told = fault
