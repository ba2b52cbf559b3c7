"""Plans run to their ends, with a moved clock and evidence that is made up."""

from __future__ import annotations

from datetime import time
from typing import Any

import pytest

from app.rollout import moves
from app.rollout.controller import DOCUMENT, Controller
from app.rollout.evidence import Evidence, Side
from app.rollout.gathering import EvidenceAway, LocalPool
from app.rollout.lease import LoneLease
from app.rollout.moves import By
from app.rollout.plan import Freeze, Guard, Plan, Step
from app.rollout.rollout import Rollout
from app.rollout.state import MemoryStore, StateAway, StateConflict
from tests.app.rollout.rollouts import rollout_over

ERRORS = (Guard(signal="errors", ratio=1.0, slack=0.002),)
STEPS = (Step(share=0.1, hold_s=10, samples=50), Step(share=1.0, hold_s=10, samples=50))


class Lease(LoneLease):
    """A lease that somebody else may have."""

    def __init__(self) -> None:
        self.is_ours = True

    async def hold(self) -> bool:
        return self.is_ours


class Rig:
    """A rollout whose plan was started, its controller, and a clock."""

    def __init__(self, **plan: Any) -> None:
        self.now = 1000.0
        self.plan = Plan(**{"steps": STEPS, "guards": ERRORS, **plan})
        self.pool = LocalPool()
        self.store = MemoryStore()
        self.lease = Lease()
        self.rollout = rollout_over(self.store, 0.0)
        self.controller = self.another()

    def another(self, rollout: Rollout | None = None) -> Controller:
        return Controller(rollout or self.rollout, self.pool, self.lease, self.store, wall_clock=lambda: self.now)

    async def start(self) -> None:
        await self.rollout.change(lambda record: moves.start(record, self.plan, "run", By("ann", self.now)), "start")

    async def see(self, side: Side, answered: int, failed: int = 0) -> None:
        seen = Evidence()
        for _ in range(answered):
            seen.count_answer(side, 0.01)
        for _ in range(failed):
            seen.count_failure(side)
        epoch = self.rollout.record.epoch
        assert epoch is not None
        await self.pool.add(epoch, seen)

    async def tick(self, seconds: float = 0.25) -> None:
        self.now += seconds
        await self.controller.tick()

    @property
    def state(self) -> tuple[float, str]:
        run = self.rollout.record.run
        assert run is not None
        return self.rollout.record.share, run.phase


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.start()
    return rig


async def test_a_step_is_passed_when_its_time_and_its_samples_are_there_and_not_before(rig: Rig) -> None:
    await rig.see("stable", 500)
    await rig.tick(11)
    assert rig.state == (0.1, "running")
    await rig.see("canary", 49)
    await rig.tick()
    assert rig.state == (0.1, "running")
    await rig.see("canary", 1)
    await rig.tick()
    assert rig.state == (1.0, "running")
    await rig.see("canary", 50)
    await rig.tick(9)
    assert rig.state == (1.0, "running")
    await rig.tick(2)
    assert rig.state == (1.0, "done")


async def test_no_share_grows_on_a_guard_that_nothing_was_seen_to_judge_by(rig: Rig) -> None:
    await rig.see("canary", 50)
    await rig.tick(60)
    assert rig.state == (0.1, "running")
    await rig.see("stable", 1)
    await rig.tick()
    assert rig.state == (1.0, "running")


async def test_a_canary_of_everybody_that_was_never_compared_waits_for_somebody() -> None:
    rig = Rig(steps=STEPS[1:])
    await rig.start()
    await rig.see("canary", 0, failed=2500)
    await rig.tick(60)
    assert rig.state == (1.0, "waiting")
    assert "errors" in rig.rollout.record.reason


async def test_a_step_that_asks_for_no_samples_asks_for_no_evidence() -> None:
    rig = Rig(steps=(Step(share=0.5, hold_s=1, samples=0), *STEPS[1:]))
    await rig.start()
    await rig.tick(2)
    assert rig.state == (1.0, "running")


async def test_a_broken_guard_takes_the_share_back_at_once_and_keeps_the_evidence(rig: Rig) -> None:
    await rig.see("canary", 50)
    await rig.see("stable", 500)
    await rig.tick(11)
    assert rig.state == (1.0, "running")
    for _ in range(40):
        await rig.see("stable", 50)
        await rig.see("canary", 25, failed=25)
        await rig.tick()
        if rig.state[1] != "running":
            break
    assert rig.state == (0.1, "rolled_back")
    run = rig.rollout.record.run
    assert run is not None
    assert "this is a breach" in run.findings[0]
    assert rig.rollout.record.changed_by == "controller"
    found = await rig.controller.findings()
    assert found is not None
    assert found["guards"][0]["breached"]


async def test_a_pause_does_not_stop_the_guards(rig: Rig) -> None:
    await rig.rollout.change(lambda record: moves.pause(record, By("ann", rig.now)), "pause")
    await rig.see("stable", 500)
    await rig.see("canary", 0, failed=300)
    await rig.tick()
    assert rig.state == (0.0, "rolled_back")


async def test_a_manual_gate_waits_for_somebody() -> None:
    rig = Rig(steps=(Step(share=0.1, hold_s=0, samples=0, gate="manual"), *STEPS[1:]))
    await rig.start()
    await rig.tick()
    assert rig.state == (0.1, "waiting")
    await rig.tick(1000)
    assert rig.state == (0.1, "waiting")
    await rig.rollout.change(lambda record: moves.promote(record, By("ann", rig.now)), "promote")
    assert rig.state == (1.0, "running")


async def test_no_share_grows_in_a_freeze() -> None:
    rig = Rig(freezes=(Freeze(days=("thu",), begin=time(0, 0), end=time(1, 0), zone="UTC"),))  # 1970-01-01 was one
    await rig.start()
    await rig.see("stable", 500)
    await rig.see("canary", 50)
    await rig.tick(60)
    assert rig.state == (0.1, "running")
    await rig.tick(3600)
    assert rig.state == (1.0, "running")


async def test_another_controller_goes_on_with_all_that_was_judged(rig: Rig) -> None:
    await rig.see("stable", 5000)
    for _ in range(3):
        await rig.see("canary", 10, failed=1)
        await rig.tick(1.5)
    before = await rig.store.read(DOCUMENT)
    rig.controller = rig.another()
    await rig.tick(1.5)
    after = await rig.store.read(DOCUMENT)
    assert before is not None
    assert after is not None
    assert after.document["judge"] == before.document["judge"]
    assert after.document["samples"] == 33


async def test_evidence_that_began_anew_is_counted_from_there(rig: Rig) -> None:
    await rig.see("stable", 500)
    await rig.see("canary", 30)
    await rig.tick(2)
    rig.pool = LocalPool()  # a restart of what held it
    rig.controller = rig.another()
    await rig.tick()
    await rig.see("canary", 20)
    await rig.tick(20)
    assert rig.state == (1.0, "running")


async def test_what_came_back_as_it_was_earlier_is_not_judged_again(rig: Rig) -> None:
    await rig.see("stable", 500)
    await rig.see("canary", 40)
    await rig.tick(2)
    rig.pool = LocalPool()  # its last minute is lost, and the rest is there again
    rig.controller = rig.another()
    await rig.see("stable", 500)
    await rig.see("canary", 30)
    await rig.tick(20)
    assert rig.state == (0.1, "running")  # 40 were seen, and not 70
    await rig.see("canary", 10)
    await rig.tick()
    assert rig.state == (1.0, "running")


async def test_a_breach_is_in_force_before_anything_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(name: str, document: Any, version: int) -> None:
        if name == DOCUMENT:
            raise StateConflict("somebody else was quicker")
        await write(name, document, version)

    write = rig.store.write
    await rig.see("stable", 500)
    await rig.see("canary", 0, failed=300)
    monkeypatch.setattr(rig.store, "write", refuse)
    with pytest.raises(StateConflict):
        await rig.tick()
    assert rig.state == (0.0, "rolled_back")


async def test_what_was_judged_is_kept_though_the_move_cannot_be_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise moves.MoveRefused("the change cannot be recorded")

    monkeypatch.setattr(rig.rollout, "change", refuse)
    await rig.see("stable", 500)
    await rig.see("canary", 50)
    with pytest.raises(moves.MoveRefused):
        await rig.tick(20)
    found = await rig.controller.findings()
    assert found is not None
    assert found["samples"] == 50


async def test_of_two_controllers_the_one_without_the_lease_does_nothing(rig: Rig) -> None:
    await rig.see("stable", 500)
    rig.lease.is_ours = False
    await rig.see("canary", 50)
    await rig.tick(20)
    assert rig.state == (0.1, "running")
    rig.lease.is_ours = True
    await rig.tick()
    assert rig.state == (1.0, "running")


async def test_while_the_evidence_is_away_the_share_stays(rig: Rig) -> None:
    class Away(LocalPool):
        async def total(self, epoch: str) -> Evidence:
            raise EvidenceAway

    rig.pool = Away()
    rig.controller = rig.another()
    with pytest.raises(EvidenceAway):
        await rig.tick(20)
    assert rig.state == (0.1, "running")


async def test_a_decision_on_what_is_in_force_no_more_is_not_made(rig: Rig) -> None:
    elsewhere = rollout_over(rig.store, 0.0)
    await elsewhere.load()
    await elsewhere.change(lambda record: moves.set_share(record, 0.3, By("ben", rig.now)))
    await rig.see("stable", 500)
    await rig.see("canary", 50)
    with pytest.raises(moves.MoveRefused, match="moved on"):
        await rig.tick(20)
    assert rig.state == (0.3, "stopped")


async def test_a_store_that_is_away_leaves_the_share_as_it_is(rig: Rig) -> None:
    async def refuse(*_: object) -> None:
        raise StateAway

    rig.store.write = refuse  # type: ignore[method-assign]
    await rig.see("canary", 50)
    with pytest.raises(StateAway):
        await rig.tick(20)
    assert rig.state == (0.1, "running")
