from app.rollout import moves
from app.rollout.evidence import Evidence
from app.rollout.gathering import Gatherer, LocalPool
from app.rollout.moves import By
from app.rollout.plan import Plan
from app.rollout.record import Record
from tests.app.rollout.rollouts import record_of

BY = By("ann", 10.0)


class Rig:
    """A worker that gathers, at the first step of a plan."""

    def __init__(self) -> None:
        self.record: Record = moves.start(record_of(0.0), Plan(), "run", BY)
        self.evidence, self.pool = Evidence(), LocalPool()
        self.gatherer = Gatherer(self.evidence, self.pool, lambda: self.record)


async def test_what_is_seen_is_sent_once() -> None:
    rig = Rig()
    await rig.gatherer.send()
    rig.evidence.count_answer("canary", 0.01)
    await rig.gatherer.send()
    await rig.gatherer.send()
    rig.evidence.count_failure("stable")
    await rig.gatherer.send()
    total = await rig.pool.total("run.1")
    assert (total["canary_requests"], total["stable_requests"], total["stable_errors"]) == (1, 1, 1)


async def test_what_is_seen_across_a_step_is_evidence_of_neither() -> None:
    rig = Rig()
    await rig.gatherer.send()
    rig.evidence.count_answer("canary", 0.01)
    rig.record = moves.promote(rig.record, BY)
    await rig.gatherer.send()
    rig.evidence.count_answer("canary", 0.01)
    await rig.gatherer.send()
    assert (await rig.pool.total("run.1"))["canary_requests"] == 0
    assert (await rig.pool.total("run.2"))["canary_requests"] == 1


async def test_without_a_plan_nothing_is_sent() -> None:
    rig = Rig()
    rig.record = record_of(0.5)
    await rig.gatherer.send()
    rig.evidence.count_answer("canary", 0.01)
    await rig.gatherer.send()
    assert not any((await rig.pool.total("run.1")).counts.values())


def test_evidence_adds_up_and_takes_apart() -> None:
    one, other = Evidence(), Evidence()
    one.count_answer("canary", 0.01)
    one.count_shadow(0, 2, outside_interval=True)
    other.add(one)
    other.count_failure("canary", invalid=True)
    difference = other.since(one)
    assert (difference["canary_requests"], difference["canary_invalid"], difference["shadow_windows"]) == (1, 1, 0)
