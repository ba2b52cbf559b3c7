"""The coalescer: who travels with whom, who waits, and that each gets exactly their own rows."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.backends.base import ExpiredInQueue
from app.backends.coalesce import Coalescer
from serve_app.contract import (
    DeadlineExceeded,
    ModelFailed,
    ModelOutputInvalid,
    NotReady,
    Options,
    Overloaded,
    ReplicaLost,
    ServingError,
    Unavailable,
)

from .hand_driven import HandDrivenLoop, HandDrivenSend, call, drive, prediction_for, spawn


def coalescer(loop: HandDrivenLoop, send: HandDrivenSend, **more: float) -> Coalescer:
    limits = {"max_group_windows": 4, "max_in_flight": 1, "max_queued_windows": 64} | more
    return Coalescer(send, clock=loop.time, **limits)


def test_a_lone_call_is_sent_at_once() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        caller = spawn(coalescer(loop, send).predict(call(7)))
        await loop.settle()
        assert send.marks == [[7]]
        send.answer(0)
        assert (await caller).prediction.regression_pred.tolist() == [7]

    drive(scenario)


def test_calls_of_one_turn_of_the_loop_share_a_group() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = [spawn(subject.predict(call(mark))) for mark in (1, 2, 3)]
        await loop.settle()
        assert send.marks == [[1, 2, 3]]
        send.answer(0)
        answers = await asyncio.gather(*callers)
        assert [a.prediction.regression_pred.tolist() for a in answers] == [[1], [2], [3]]
        assert [a.groups for a in answers] == [((1, 3),)] * 3

    drive(scenario)


def test_calls_gather_while_all_slots_are_taken_and_leave_together() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = []
        for mark in (1, 2, 3):
            callers.append(spawn(subject.predict(call(mark))))
            await loop.settle()
        assert send.marks == [[1]]
        send.answer(0)
        await loop.settle()
        assert send.marks == [[1], [2, 3]]
        send.answer(1)
        await asyncio.gather(*callers)
        assert subject.is_idle

    drive(scenario)


def test_a_group_never_exceeds_its_windows() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_in_flight=3)
        callers = [spawn(subject.predict(call(*marks))) for marks in ((1, 2, 3), (4, 5), (6, 7))]
        await loop.settle()
        assert send.marks == [[1, 2, 3], [4, 5, 6, 7]]
        send.answer_all()
        await asyncio.gather(*callers)

    drive(scenario)


def test_a_call_larger_than_a_group_is_split_and_put_together_in_order() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        caller = spawn(coalescer(loop, send, max_in_flight=3).predict(call(*range(10))))
        await loop.settle()
        assert send.marks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        for index in (2, 0, 1):
            send.answer(index, model_ms=float(index))
        answer = await caller
        assert answer.prediction.regression_pred.tolist() == list(range(10))
        assert answer.groups == ((4, 4), (4, 4), (2, 2))

    drive(scenario)


def test_parts_answered_by_two_model_versions_are_not_joined() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        caller = spawn(coalescer(loop, send, max_in_flight=2).predict(call(*range(5))))
        await loop.settle()
        send.answer(0, version="1")
        send.answer(1, version="2")
        with pytest.raises(Unavailable):
            await caller

    drive(scenario)


def test_versions_and_options_never_share_a_group() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_in_flight=4)
        bare = Options(return_uncertainty=False)
        calls = [call(1), call(2, version="2"), call(3, options=bare), call(4), call(5, version="2")]
        callers = [spawn(subject.predict(c)) for c in calls]
        await loop.settle()
        assert send.marks == [[1, 4], [2, 5], [3]]
        assert [(g.version, g.options) for g in send.groups] == [(None, Options()), ("2", Options()), (None, bare)]
        send.answer_all()
        await asyncio.gather(*callers)

    drive(scenario)


def test_more_slots_are_used_as_soon_as_they_are_given() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = []
        for mark in (1, 2):
            callers.append(spawn(subject.predict(call(mark))))
            await loop.settle()
        assert send.marks == [[1]]
        subject.max_in_flight = 2
        callers.append(spawn(subject.predict(call(3))))
        await loop.settle()
        assert send.marks == [[1], [2, 3]]
        send.answer_all()
        await asyncio.gather(*callers)

    drive(scenario)


def test_the_lane_that_waited_longest_goes_first() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = []
        for mark, version in ((0, None), (1, "b"), (2, "a"), (3, "b")):
            callers.append(spawn(subject.predict(call(mark, version=version))))
            await loop.advance(0.001)
        for index in range(3):
            send.answer(index)
            await loop.settle()
        assert send.marks == [[0], [1, 3], [2]]
        await asyncio.gather(*callers)

    drive(scenario)


def test_beyond_the_queue_calls_are_refused_and_the_queue_is_unharmed() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_queued_windows=4)
        callers = [spawn(subject.predict(call(0)))]
        await loop.settle()
        callers += [spawn(subject.predict(call(mark))) for mark in (1, 2, 3, 4)]
        await loop.settle()
        with pytest.raises(Overloaded):
            await subject.predict(call(5))
        send.answer(0)
        await loop.settle()
        callers.append(spawn(subject.predict(call(6))))
        send.answer(1)
        await loop.settle()
        send.answer(2)
        assert [float((await c).prediction.regression_pred[0]) for c in callers] == [0, 1, 2, 3, 4, 6]

    drive(scenario)


def test_a_flood_that_fills_the_queue_leaves_room_for_others_but_not_without_end() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_queued_windows=4)
        flood(subject, 4)
        await loop.settle()  # four are under way
        flood(subject, 4)
        await loop.settle()  # four wait
        with pytest.raises(Overloaded):
            await subject.predict(call(99, principal="flood"))
        others = [spawn(subject.predict(call(mark, principal=f"quiet {mark}"))) for mark in range(4)]
        await loop.settle()
        assert [other.done() for other in others] == [False, False, False, True]
        with pytest.raises(Overloaded):
            await others[3]
        subject.close()

    drive(scenario)


def test_a_cancelled_caller_leaves_the_queue_at_once() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = []
        for mark in (1, 2, 3):
            callers.append(spawn(subject.predict(call(mark))))
            await loop.settle()
        callers[1].cancel()
        await loop.settle()
        assert subject.stats()["queued_windows"] == 1
        send.answer(0)
        await loop.settle()
        assert send.marks == [[1], [3]]
        send.answer(1)
        await asyncio.gather(callers[0], callers[2])

    drive(scenario)


def test_a_group_goes_on_while_one_caller_is_left_and_is_cancelled_with_the_last() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        first, second = (spawn(subject.predict(call(mark))) for mark in (1, 2))
        await loop.settle()
        first.cancel()
        await loop.settle()
        assert send.cancelled == []
        second.cancel()
        await loop.settle()
        assert send.cancelled == send.groups
        assert subject.is_idle

    drive(scenario)


def test_a_group_cancelled_before_its_first_step_gives_its_slot_back() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        gone = spawn(subject.predict(call(1)))
        await asyncio.sleep(0)  # admitted
        await asyncio.sleep(0)  # launched, its task not yet run
        gone.cancel()
        await loop.settle()
        kept = spawn(subject.predict(call(2)))
        await loop.settle()
        assert send.marks[-1] == [2]
        send.answer(len(send.groups) - 1)
        await kept

    drive(scenario)


def test_a_waiting_caller_is_released_at_its_deadline_and_never_sent() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        first = spawn(subject.predict(call(1, deadline=1010)))
        await loop.settle()
        late = spawn(subject.predict(call(2, deadline=1001)))
        await loop.advance(0.999)
        assert not late.done()
        await loop.advance(0.002)
        with pytest.raises(ExpiredInQueue):
            await late
        await loop.advance(9.0)
        with pytest.raises(DeadlineExceeded) as told:
            await first
        assert type(told.value) is DeadlineExceeded
        assert send.marks == [[1]]
        assert subject.is_idle

    drive(scenario)


def test_expired_work_is_dropped_at_the_moment_of_sending_too() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        late, kept = spawn(subject.predict(call(1, deadline=1001))), spawn(subject.predict(call(2, deadline=1010)))
        await asyncio.sleep(0)
        loop.now += 2  # the loop was held up: the launch runs in the same turn as the timer
        await loop.settle()
        assert send.marks == [[2]]
        send.answer(0)
        await kept
        with pytest.raises(DeadlineExceeded):
            await late

    drive(scenario)


def test_a_call_that_arrives_past_its_deadline_is_refused() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        with pytest.raises(DeadlineExceeded):
            await coalescer(loop, send).predict(call(1, deadline=loop.now))
        assert send.groups == []

    drive(scenario)


def test_a_group_under_way_carries_the_latest_deadline_and_releases_each_caller_at_its_own() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        hasty, patient = (spawn(subject.predict(call(1, deadline=deadline))) for deadline in (1001, 1005))
        await loop.settle()
        assert send.groups[0].deadline == 1005
        await loop.advance(1.5)
        with pytest.raises(DeadlineExceeded):
            await hasty
        send.answer(0)
        await patient

    drive(scenario)


@pytest.mark.parametrize(
    ("raised", "seen"), [(ReplicaLost("it died"), ReplicaLost), (RuntimeError("unforeseen"), ServingError)]
)
def test_a_failing_group_touches_no_other(raised: Exception, seen: type[ServingError]) -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_in_flight=2)
        good, bad, worse = (spawn(subject.predict(call(m, version=v))) for m, v in ((1, "a"), (2, "b"), (3, "b")))
        await loop.settle()
        send.fail(1, raised)
        for caller in (bad, worse):
            with pytest.raises(seen) as caught:
                await caller
            assert "unforeseen" not in caught.value.detail
        send.answer(0)
        await good

    drive(scenario)


def test_after_the_model_failed_on_a_group_each_call_is_sent_alone_and_only_the_bad_one_fails() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        good, bad, late = (spawn(subject.predict(call(mark))) for mark in (1, 2, 3))
        await loop.settle()
        send.fail(0, ModelFailed("the model failed"))
        await loop.settle()
        send.answer(1)
        await loop.settle()
        send.fail(2, ModelFailed("the model failed"))
        await loop.settle()
        send.answer(3)
        assert (await good).prediction.regression_pred.tolist() == [1]
        assert (await late).prediction.regression_pred.tolist() == [3]
        with pytest.raises(ModelFailed):
            await bad
        assert send.marks == [[1, 2, 3], [1], [2], [3]]

    drive(scenario)


def test_who_left_is_not_sent_again_after_the_model_failed() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        gone, stays = (spawn(subject.predict(call(mark))) for mark in (1, 2))
        await loop.settle()
        gone.cancel()
        await loop.settle()
        send.fail(0, ModelFailed("the model failed"))
        await loop.settle()
        send.answer(1)
        assert (await stays).prediction.regression_pred.tolist() == [2]
        assert send.marks == [[1, 2], [2]]

    drive(scenario)


def test_a_window_that_the_model_answers_with_nan_fails_its_own_call_only() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        good, bad = (spawn(subject.predict(call(mark))) for mark in (1, 2))
        await loop.settle()
        answer = prediction_for(np.array([1, np.nan], np.float32))
        send.answer_with(0, answer)
        assert (await good).prediction.regression_pred.tolist() == [1]
        with pytest.raises(ModelOutputInvalid):
            await bad

    drive(scenario)


def flood(subject: Coalescer, count: int, *, principal: str = "flood") -> list[asyncio.Future]:
    return [spawn(subject.predict(call(mark, principal=principal))) for mark in range(count)]


async def run_saturated(loop: HandDrivenLoop, send: HandDrivenSend, groups: range, *, each_s: float) -> None:
    for index in groups:
        await loop.advance(each_s)
        send.answer(index)
        await loop.settle()


def test_a_call_that_would_wait_too_long_at_the_present_pace_is_refused_on_arrival() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=0.25)
        callers = flood(subject, 40)
        await run_saturated(loop, send, range(3), each_s=0.1)  # four windows each: 25 ms per window
        with pytest.raises(Overloaded):  # 24 windows wait: 0.6 s
            await subject.predict(call(99, principal="flood"))
        await run_saturated(loop, send, range(3, 9), each_s=0.1)  # none wait
        late = spawn(subject.predict(call(99, principal="flood")))
        await loop.settle()
        send.answer_all()
        await loop.settle()
        send.answer_all()
        await late
        await asyncio.gather(*callers)

    drive(scenario)


def test_a_call_whose_deadline_is_nearer_than_its_turn_is_refused_on_arrival() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=10.0)
        flood(subject, 19)
        await run_saturated(loop, send, range(3), each_s=0.1)  # 0.1 s are under way, three windows wait
        with pytest.raises(Overloaded):
            await subject.predict(call(99, deadline=loop.now + 0.15, principal="flood"))
        patient = spawn(subject.predict(call(99, deadline=loop.now + 5, principal="flood")))
        await loop.settle()
        assert not patient.done()
        subject.close()
        with pytest.raises(NotReady):
            await patient

    drive(scenario)


def test_what_is_under_way_counts_against_a_deadline_as_well() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=10.0)
        flood(subject, 12)
        await run_saturated(loop, send, range(1), each_s=0.4)  # 0.4 s are under way, 0.4 s wait
        with pytest.raises(Overloaded):
            await subject.predict(call(99, deadline=loop.now + 0.7, principal="flood"))
        patient = spawn(subject.predict(call(99, deadline=loop.now + 0.9, principal="flood")))
        await loop.settle()
        assert not patient.done()
        subject.close()
        with pytest.raises(NotReady):
            await patient

    drive(scenario)


def test_after_a_model_failure_each_call_goes_as_a_repeat() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = [spawn(subject.predict(call(mark))) for mark in (1, 2)]
        await loop.settle()
        send.fail(0, ModelFailed("m"))
        await loop.settle()
        send.answer(1)
        await loop.settle()
        send.answer(2)
        await asyncio.gather(*callers)
        assert [group.is_repeat for group in send.groups] == [False, True, True]

    drive(scenario)


@pytest.mark.parametrize(
    ("timeout_s", "kind"),
    [
        (1.9, ExpiredInQueue),  # 1.8 s in the queue, 0.1 s under way
        (2.29, ExpiredInQueue),
        (2.31, DeadlineExceeded),  # half a second is fair, whatever went before
    ],
)
def test_what_was_sent_just_before_its_deadline_expired_for_the_queue(
    timeout_s: float, kind: type[DeadlineExceeded]
) -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        first = spawn(subject.predict(call(1, deadline=loop.now + 10)))
        await loop.settle()
        late = spawn(subject.predict(call(2, deadline=loop.now + timeout_s)))
        await loop.advance(1.8)
        send.answer(0)
        await loop.settle()
        assert first.done()
        assert send.marks == [[1], [2]]
        await loop.advance(timeout_s)
        with pytest.raises(DeadlineExceeded) as raised:
            await late
        assert type(raised.value) is kind

    drive(scenario)


def test_a_short_deadline_that_was_spent_under_way_is_no_fault_of_the_queue() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        subject = coalescer(loop, HandDrivenSend())
        hasty = spawn(subject.predict(call(1, deadline=loop.now + 0.1)))
        await loop.advance(0.1)
        with pytest.raises(DeadlineExceeded) as raised:
            await hasty
        assert type(raised.value) is DeadlineExceeded

    drive(scenario)


def test_a_large_call_of_which_a_part_hangs_did_not_expire_in_the_queue() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        large = spawn(subject.predict(call(*range(8))))
        await loop.advance(2.0)
        assert send.marks == [[0, 1, 2, 3]]
        with pytest.raises(DeadlineExceeded) as raised:
            await large
        assert type(raised.value) is DeadlineExceeded

    drive(scenario)


def test_the_slower_the_model_the_smaller_the_groups() -> None:
    """All slots hold work for half of the longest wait: whoever is admitted waits for what is under way too."""

    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_in_flight=2, max_wait_s=0.8)
        flood(subject, 24)
        await loop.advance(0.4)
        send.answer(0)  # four windows in 0.4 s: 0.2 s are two of them
        await loop.settle()
        assert [group.n_windows for group in send.groups] == [4, 4, 2]
        send.answer(1)  # eight windows in 0.4 s
        await loop.settle()
        assert send.groups[3].n_windows == 4
        subject.close()

    drive(scenario)


def test_a_call_larger_than_a_small_group_still_goes() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=0.4)
        flood(subject, 4)
        await loop.settle()
        large = spawn(subject.predict(call(*range(4))))
        await run_saturated(loop, send, range(1), each_s=1.0)
        assert send.groups[1].n_windows == 4
        send.answer(1)
        assert len((await large).prediction) == 4

    drive(scenario)


def test_a_group_that_was_sent_twice_says_nothing_of_the_pace() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=0.5)
        crowd = flood(subject, 12)
        await loop.settle()
        send.groups[0].was_retried = True
        await run_saturated(loop, send, range(1), each_s=0.8)
        assert subject.stats()["ms_per_window"] == 0
        await run_saturated(loop, send, range(1, 3), each_s=0.04)
        assert all(caller.result() for caller in crowd)

    drive(scenario)


def test_one_quick_answer_ends_the_memory_of_slow_times() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=0.5)
        crowd = flood(subject, 12)
        await run_saturated(loop, send, range(3), each_s=0.4)
        assert all(caller.done() for caller in crowd)
        assert subject.stats()["ms_per_window"] == pytest.approx(100)
        alone = spawn(subject.predict(call(1)))
        await loop.advance(0.01)
        send.answer(3)
        await alone
        assert subject.stats()["ms_per_window"] == pytest.approx(10)
        burst = flood(subject, 10)
        await run_saturated(loop, send, range(4, 7), each_s=0.01)
        assert all(caller.result() for caller in burst)

    drive(scenario)


def test_a_backend_that_fails_slowly_does_not_look_busy() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=0.25)
        flood(subject, 40)
        for index in range(3):
            await loop.advance(0.4)
            send.fail(index, ReplicaLost("gone"))
            await loop.settle()
        waiting = spawn(subject.predict(call(99, deadline=loop.now + 2, principal="flood")))
        await loop.settle()
        assert not waiting.done()
        subject.close()
        with pytest.raises(NotReady):
            await waiting

    drive(scenario)


def test_a_flood_is_refused_while_another_principal_is_let_in_and_goes_next() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_wait_s=0.25)
        flood(subject, 40)
        await run_saturated(loop, send, range(3), each_s=0.1)
        with pytest.raises(Overloaded):
            await subject.predict(call(99, principal="flood"))
        quiet = spawn(subject.predict(call(77, principal="quiet")))
        await loop.settle()
        send.answer(3)
        await loop.settle()
        assert 77 in send.marks[4]
        send.answer(4)
        assert (await quiet).prediction.regression_pred.tolist() == [77]
        subject.close()

    drive(scenario)


def test_an_answer_with_too_few_rows_reaches_nobody() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        callers = [spawn(subject.predict(call(mark))) for mark in (1, 2)]
        await loop.settle()
        send.answer_with(0, prediction_for(np.ones(1, np.float32)))
        for caller in callers:
            with pytest.raises(ModelOutputInvalid):
                await caller

    drive(scenario)


def test_the_stages_add_up_to_the_wait() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        first = spawn(subject.predict(call(0)))
        await loop.settle()
        second = spawn(subject.predict(call(1)))
        await loop.advance(0.010)
        send.answer(0)
        await loop.settle()
        await loop.advance(0.020)
        send.answer(1, model_ms=12.0, wait_ms=3.0)
        stages = (await second).stages_ms
        assert stages == pytest.approx({"queue": 10.0, "transport": 5.0, "batch": 3.0, "model": 12.0})
        await first

    drive(scenario)


def test_closing_fails_the_waiting_and_the_flying() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send)
        flying = spawn(subject.predict(call(1)))
        await loop.settle()
        waiting = spawn(subject.predict(call(2)))
        await loop.settle()
        subject.close()
        for caller in (flying, waiting):
            with pytest.raises(NotReady):
                await caller
        await loop.settle()
        assert subject.is_idle
        assert send.cancelled == send.groups

    drive(scenario)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.integers(1, 11), st.sampled_from([None, "2"]), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("answer"), st.integers(0, 30)),
        st.tuples(st.just("fail"), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.floats(0.1, 2.0)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, max_in_flight=st.integers(1, 3))
def test_every_call_is_answered_exactly_once_with_its_own_rows(steps: list[tuple], max_in_flight: int) -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        send = HandDrivenSend()
        subject = coalescer(loop, send, max_in_flight=max_in_flight, max_queued_windows=24)
        callers: list[tuple[list[int], asyncio.Future]] = []
        next_mark = 0
        for kind, *more in steps:
            if kind == "call":
                n, version, patience = more
                marks = list(range(next_mark, next_mark + n))
                next_mark += n
                request = call(*marks, version=version, deadline=loop.now + patience)
                callers.append((marks, spawn(subject.predict(request))))
            elif kind == "cancel" and callers:
                callers[more[0] % len(callers)][1].cancel()
            elif kind in ("answer", "fail") and send.groups:
                index = more[0] % len(send.groups)
                if not send._answers[index].done():
                    send.answer(index) if kind == "answer" else send.fail(index, ReplicaLost())
            elif kind == "pass":
                await loop.advance(more[0])
            await loop.settle()
            assert len([a for a in send._answers.values() if not a.done()]) <= max_in_flight
            assert 0 <= subject.stats()["queued_windows"] <= 2 * 24
        while not subject.is_idle:
            send.answer_all()
            await loop.settle()
        for marks, caller in callers:
            assert caller.done()
            if not caller.cancelled() and caller.exception() is None:
                assert caller.result().prediction.regression_pred.tolist() == marks
        sent = [mark for group in send.marks for mark in group]
        assert len(sent) == len(set(sent))
        assert all(len(group) <= 4 for group in send.marks)

    drive(scenario)
