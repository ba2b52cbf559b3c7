from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.rollout import moves
from app.rollout.moves import By, MoveRefused
from app.rollout.plan import ArmName, Plan, Step
from app.rollout.record import Record, parse_record
from tests.app.rollout.rollouts import record_of

BY = By("ann", 10.0, "because")
PLAN = Plan(steps=(Step(share=0.1), Step(share=0.5), Step(share=1.0)))


def started(share: float = 0.0) -> Record:
    return moves.start(record_of(share), PLAN, "run", BY)


def test_a_plan_begins_at_its_first_step_and_keeps_what_was_before_as_good() -> None:
    record = started()
    assert record.run is not None
    assert (record.share, record.run.phase, record.run.good, record.epoch) == (0.1, "running", 0.0, "run.1")


def test_a_plan_begins_at_the_first_step_that_takes_nobody_back() -> None:
    record = started(0.3)
    assert record.run is not None
    assert (record.share, record.run.step, record.run.good) == (0.5, 1, 0.3)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_plan_from_an_arm_that_does_not_serve_everybody_is_refused(share: float) -> None:
    stable = ArmName(backend="legacy") if share == 1.0 else ArmName(backend="ray_serve", version="1")
    plan = Plan(stable=stable, canary=ArmName(backend="ray_serve", version="2"))
    record = record_of(share).model_copy(update={"canary": ArmName(backend="ray_serve", version="1")})
    with pytest.raises(MoveRefused, match="cannot begin there"):
        moves.start(record, plan, "run", BY)


def test_after_a_migration_a_new_version_is_moved_to_from_ray_serve() -> None:
    stable, canary = (ArmName(backend="ray_serve", version=version) for version in ("1", "2"))
    record = moves.start(record_of(1.0), Plan(stable=stable, canary=canary), "run", BY)
    assert (record.share, record.stable, record.canary) == (0.01, stable, canary)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_plan_that_begins_at_the_share_in_force_goes_back_to_nobody(share: float) -> None:
    record = moves.breach(started(share), BY, ["too many errors"])
    assert record.share == 0.0


def test_after_a_version_was_moved_to_the_next_plan_begins_from_that_version_and_no_other() -> None:
    stable, canary = (ArmName(backend="ray_serve", version=version) for version in ("3", "4"))
    done = moves.set_share(moves.start(record_of(1.0), Plan(stable=stable, canary=canary), "run", BY), 1.0, BY)
    next_one = ArmName(backend="ray_serve", version="5")
    for wrong in (ArmName(backend="ray_serve"), stable):
        with pytest.raises(MoveRefused, match="cannot begin there"):
            moves.start(done, Plan(stable=wrong, canary=next_one), "next", BY)
    assert moves.start(done, Plan(stable=canary, canary=next_one), "next", BY).stable == canary


def test_a_plan_to_whatever_ray_serves_does_not_take_over_the_share_of_a_version() -> None:
    record = record_of(0.5).model_copy(update={"canary": ArmName(backend="ray_serve", version="4")})
    with pytest.raises(MoveRefused, match="cannot begin there"):
        moves.start(record, PLAN, "run", BY)


def test_shares_of_single_accounts_do_not_go_over_to_other_arms() -> None:
    pinned = moves.set_override(record_of(1.0), "tenant:acme", 1.0, BY)
    plan = Plan(stable=ArmName(backend="ray_serve"), canary=ArmName(backend="ray_serve", version="4"))
    with pytest.raises(MoveRefused, match="tenant:acme"):
        moves.start(pinned, plan, "run", BY)
    assert moves.start(moves.set_override(pinned, "tenant:acme", None, BY), plan, "run", BY).share == 0.01


def test_a_rollback_after_its_end_undoes_a_plan() -> None:
    done = moves.promote(moves.promote(moves.promote(started(), BY), BY), BY)
    back = moves.roll_back(done, BY)
    assert done.run is not None
    assert back.run is not None
    assert (done.run.phase, back.run.phase, back.share) == ("done", "rolled_back", 0.0)


def test_every_step_that_was_passed_is_the_good_one_and_the_last_ends_the_plan() -> None:
    record = moves.advance(started(), BY)
    assert record.run is not None
    assert (record.share, record.run.good, record.epoch) == (0.5, 0.1, "run.2")
    record = moves.advance(moves.advance(record, BY), BY)
    assert record.run is not None
    assert (record.share, record.run.phase, record.epoch) == (1.0, "done", None)


def test_a_breach_goes_back_to_the_last_good_step_and_keeps_why() -> None:
    record = moves.breach(moves.advance(started(), BY), BY, ["too many errors"])
    assert record.run is not None
    assert (record.share, record.run.phase, record.run.findings) == (0.1, "rolled_back", ("too many errors",))


def test_a_step_that_was_promoted_away_from_before_it_was_passed_is_none_to_go_back_to() -> None:
    hurried = moves.promote(moves.promote(started(), BY), BY)
    assert (hurried.share, moves.breach(hurried, BY, ["too many errors"]).share) == (1.0, 0.0)
    gated = moves.promote(moves.wait(started(), BY), BY)
    assert moves.breach(gated, BY, ["too many errors"]).share == 0.1


def test_of_two_who_promote_what_they_both_saw_one_does() -> None:
    seen = started()
    promoted = moves.promote(seen, BY, seen.epoch)
    with pytest.raises(MoveRefused, match="moved on"):
        moves.promote(promoted, BY, seen.epoch)


def test_a_rollback_moves_everybody_back_those_with_shares_of_their_own_too() -> None:
    record = moves.roll_back(moves.set_override(started(), "sub:eve", 1.0, BY), BY)
    assert record.run is not None
    assert (record.share, record.overrides, record.run.phase) == (0.0, {}, "rolled_back")


def test_back_to_legacy_is_a_way_from_everywhere() -> None:
    stable, canary = (ArmName(backend="ray_serve", version=version) for version in ("1", "2"))
    record = moves.start(record_of(1.0), Plan(stable=stable, canary=canary), "run", BY)
    back = moves.roll_back_to_legacy(record, BY)
    assert (back.share, back.ray_serve_share) == (0.0, 0.0)


def test_a_pause_holds_and_what_resumes_begins_its_step_anew() -> None:
    paused = moves.pause(started(), BY)
    with pytest.raises(MoveRefused, match="running, not paused"):
        moves.resume(started(), BY)
    record = moves.resume(paused, By("ann", 99.0))
    assert record.run is not None
    assert (record.share, record.run.since, record.epoch) == (0.1, 99.0, "run.2")


def test_a_share_set_by_hand_stops_the_plan() -> None:
    record = moves.set_share(started(), 0.7, BY)
    assert record.run is not None
    assert (record.share, record.run.phase, record.epoch) == (0.7, "stopped", None)


@pytest.mark.parametrize("move", [moves.pause, moves.resume, moves.promote, moves.wait])
def test_without_a_plan_nothing_of_it_moves(move: object) -> None:
    with pytest.raises(MoveRefused, match="no plan"):
        move(record_of(0.5), BY)  # type: ignore[operator]


def test_a_second_plan_waits_for_the_end_of_the_first() -> None:
    with pytest.raises(MoveRefused, match="running"):
        moves.start(started(), PLAN, "other", BY)


def test_what_moves_somebody_to_a_canary_grows_and_nothing_else_does() -> None:
    old = started()
    assert moves.grows(old, moves.promote(old, BY))
    assert moves.grows(old, moves.set_override(old, "sub:eve", 0.5, BY))
    assert not moves.grows(old, moves.pause(old, BY))
    assert not moves.grows(old, moves.roll_back(old, BY))
    assert not moves.grows(old, moves.breach(old, BY, []))


def test_back_to_legacy_is_no_growth_though_the_arms_change() -> None:
    stable, canary = (ArmName(backend="ray_serve", version=version) for version in ("1", "2"))
    record = moves.start(record_of(1.0), Plan(stable=stable, canary=canary), "run", BY)
    assert not moves.grows(record, moves.roll_back_to_legacy(record, BY))


def test_an_account_grows_by_what_it_had_before() -> None:
    held_back = moves.set_override(record_of(1.0), "tenant:acme", 0.0, BY)
    assert moves.grows(held_back, moves.set_override(held_back, "tenant:acme", None, BY))
    half = record_of(0.5)
    assert not moves.grows(half, moves.set_override(half, "tenant:acme", 0.3, BY))


def test_a_record_is_read_as_it_was_written() -> None:
    record = moves.set_override(moves.promote(started(), BY), "tenant:acme", 0.25, BY)
    assert parse_record(record.document()) == record


@pytest.mark.parametrize(
    "change", [{"share": 1.5}, {"share": "x"}, {"changed_at": float("inf")}, {"more": 1}, {"overrides": {"a": 2}}]
)
def test_what_is_no_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a stored rollout"):
        parse_record({**record_of(0.5).document(), **change})


Move = Callable[[Record, By], Record]
FORWARD: dict[str, Move] = {
    "start": lambda record, by: moves.start(record, PLAN, f"run-{by.at:g}", by),
    "pause": moves.pause,
    "resume": moves.resume,
    "promote": moves.promote,
    "wait": moves.wait,
    "finish": lambda record, by: moves.finish(record, by, ("kept",)),
}
BACK: dict[str, Move] = {
    "breach": lambda record, by: moves.breach(record, by, ("broken",)),
    "roll_back": moves.roll_back,
    "roll_back_to_legacy": moves.roll_back_to_legacy,
}
BY_HAND: dict[str, Move] = {
    "set_0": lambda record, by: moves.set_share(record, 0.0, by),
    "set_0.3": lambda record, by: moves.set_share(record, 0.3, by),
    "set_1": lambda record, by: moves.set_share(record, 1.0, by),
}
MOVES = FORWARD | BACK | BY_HAND


@settings(max_examples=300, deadline=None)
@given(share=st.sampled_from([0.0, 0.3, 1.0]), names=st.lists(st.sampled_from(sorted(MOVES)), max_size=12))
def test_whatever_is_done_in_whatever_order_nobody_is_moved_back_but_by_a_way_back(
    share: float, names: list[str]
) -> None:
    record = record_of(share)
    for at, name in enumerate(names):
        try:
            after = MOVES[name](record, By("ann", float(at), name))
        except MoveRefused:
            continue
        assert parse_record(after.document()) == after, "it can be stored and read again"
        if name in FORWARD:
            assert after.share >= record.share
        if name in BACK:
            assert after.share <= record.share
            assert not moves.grows(record, after)
            assert after.run is None or not after.run.active
        run = after.run
        if run is not None and run.active:
            assert after.share == run.plan.steps[run.step].share
            assert run.good < after.share
        record = after


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(MOVES)), max_size=12))
def test_evidence_of_one_step_never_goes_by_the_name_of_another(names: list[str]) -> None:
    record, before = record_of(0.0), dict[str, tuple[float, float]]()
    for at, name in enumerate(names):
        try:
            record = MOVES[name](record, By("ann", float(at)))
        except MoveRefused:
            continue
        if record.epoch is not None and record.run is not None:
            assert before.setdefault(record.epoch, (record.share, record.run.since)) == (record.share, record.run.since)


def test_a_subject_that_gets_its_tenants_greater_share_moves_to_the_canary() -> None:
    apart = record_of(0.0)
    for account, share in (("tenant:acme", 1.0), ("sub:acme/ann", 0.0)):
        apart = moves.set_override(apart, account, share, BY)
    assert moves.grows(apart, moves.set_override(apart, "sub:acme/ann", None, BY))
    assert not moves.grows(apart, moves.set_override(apart, "tenant:acme", None, BY))
