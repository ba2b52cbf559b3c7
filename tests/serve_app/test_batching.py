import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve_app.batching import DrainQueue
from serve_app.contract import DeadlineExceeded, FloatArray, ModelFailed, Options, OutOfMemory, Overloaded, Prediction

POISON = -13.0
FAR = 1e6


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class GatedModel:
    """Answers each window with its own first value; while the gate is shut, forward passes wait at it."""

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[float]] = []
        self.entered = threading.Event()

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        self.batches.append(windows[:, 0, 0].tolist())
        self.entered.set()
        assert self.gate.wait(10)
        if (windows == POISON).any():
            raise RuntimeError("poisoned")
        return Prediction(
            classification_probs=np.full((len(windows), 3), 1 / 3, np.float32),
            regression_pred=windows[:, 0, 0].copy(),
            regression_uncertainty=None,
            aleatoric=None,
            epistemic=None,
            predictive_entropy=None,
            ensemble_weights=None,
            features=None,
            model_name="fake",
            model_version=self.version,
            model_time_ms=1.0,
        )


class PlacedModel(GatedModel):
    """Remembers on which thread each batch ran, and which callers had been answered by then."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.done: list[float] = []
        self.done_before: list[list[float]] = []

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        self.threads.append(threading.get_ident())
        self.done_before.append(list(self.done))
        return super().predict(windows, options)


class TimedModel(GatedModel):
    """Takes 10 ms of a clock for each window."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        self.clock.now += 0.010 * len(windows)
        return replace(super().predict(windows, options), model_time_ms=10.0 * len(windows))


class ShortModel(GatedModel):
    """Loses the last window."""

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        return super().predict(windows[:-1], options)


def windows(*values: float) -> FloatArray:
    return np.repeat(np.array(values, np.float32), 50 * 60).reshape(-1, 50, 60)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queue(clock: FakeClock) -> Iterator[DrainQueue]:
    queue = DrainQueue(max_batch_windows=8, max_queue_windows=32, clock=clock)
    yield queue
    queue.close()


@pytest.fixture
def model() -> Iterator[GatedModel]:
    model = GatedModel()
    yield model
    model.gate.set()


class Caller:
    """Sends calls and remembers them; `hold` keeps the model busy with one call, so that the next ones wait."""

    def __init__(self, queue: DrainQueue, model: GatedModel) -> None:
        self.queue, self.model = queue, model

    def send(self, *values: float, options: Options = Options(), deadline: float = FAR, model: Any = None) -> Any:  # noqa: B008
        call = self.queue.predict(model or self.model, windows(*values), options, deadline=deadline)
        return asyncio.create_task(call)

    async def hold(self) -> Any:
        self.model.gate.clear()
        held = self.send(0.0)
        await asyncio.to_thread(self.model.entered.wait, 10)
        self.model.batches.clear()
        return held

    async def settle(self) -> None:
        """Let every call that was sent reach the queue."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def release(self) -> None:
        await self.settle()
        self.model.gate.set()


@pytest.fixture
def caller(queue: DrainQueue, model: GatedModel) -> Caller:
    return Caller(queue, model)


async def values_of(task: asyncio.Task[Prediction]) -> list[float]:
    return [float(value) for value in (await task).regression_pred]


async def test_a_call_that_finds_the_model_free_runs_alone_at_once(caller: Caller, model: GatedModel) -> None:
    assert await values_of(caller.send(1, 2)) == [1, 2]
    assert model.batches == [[1, 2]]


async def test_what_waits_when_the_model_gets_free_is_one_batch(caller: Caller, model: GatedModel) -> None:
    await caller.hold()
    calls = [caller.send(1, 2), caller.send(3), caller.send(4, 5, 6)]
    await caller.release()
    assert [await values_of(call) for call in calls] == [[1, 2], [3], [4, 5, 6]]
    assert model.batches == [[1, 2, 3, 4, 5, 6]]


async def test_a_batch_is_capped_in_windows_and_a_larger_call_is_split_and_joined(
    caller: Caller, model: GatedModel
) -> None:
    await caller.hold()
    calls = [caller.send(1, 2), caller.send(*range(10, 28)), caller.send(3)]
    await caller.release()
    assert [await values_of(call) for call in calls] == [[1, 2], list(range(10, 28)), [3]]
    assert [len(batch) for batch in model.batches] == [8, 8, 5]


async def test_calls_with_other_options_go_into_another_batch(caller: Caller, model: GatedModel) -> None:
    plain, alone = Options(), Options(use_ensemble=False)
    await caller.hold()
    calls = [caller.send(1, options=plain), caller.send(2, options=alone), caller.send(3, options=plain)]
    await caller.release()
    await asyncio.gather(*calls)
    assert model.batches == [[1, 3], [2]]


async def test_a_call_is_answered_by_the_version_it_came_for(caller: Caller) -> None:
    await caller.hold()
    old, new = caller.send(1), caller.send(2, model=GatedModel("2"))
    await caller.release()
    assert [(await call).model_version for call in (old, new)] == ["1", "2"]


async def test_the_time_in_the_queue_is_told(caller: Caller, clock: FakeClock) -> None:
    await caller.hold()
    call = caller.send(1)
    await caller.settle()
    clock.now += 0.25
    await caller.release()
    assert (await call).batch_wait_ms == pytest.approx(250)


async def test_the_times_of_a_split_call_add_up_to_its_whole_wait(caller: Caller, clock: FakeClock) -> None:
    started = clock.now
    answer = await caller.send(*range(11), model=TimedModel(clock))
    waited_ms = 1e3 * (clock.now - started)
    assert answer.batch_wait_ms + answer.model_time_ms == pytest.approx(waited_ms) == pytest.approx(110)


async def test_expired_work_never_reaches_the_model(caller: Caller, clock: FakeClock, model: GatedModel) -> None:
    await caller.hold()
    late, good = caller.send(1, deadline=101.0), caller.send(2)
    await caller.settle()
    clock.now = 102.0
    await caller.release()
    with pytest.raises(DeadlineExceeded):
        await late
    assert await values_of(good) == [2]
    assert model.batches == [[2]]
    with pytest.raises(DeadlineExceeded):
        await caller.send(3, deadline=101.0)


async def test_a_caller_is_told_at_its_deadline_while_the_model_hangs(caller: Caller, clock: FakeClock) -> None:
    await caller.hold()
    with pytest.raises(DeadlineExceeded):
        await caller.send(1, deadline=clock.now + 0.01)
    assert caller.queue.waiting_windows == 0


async def test_a_full_queue_sheds_and_takes_again_when_there_is_room(caller: Caller, queue: DrainQueue) -> None:
    held = await caller.hold()
    waiting = caller.send(*range(30))
    await caller.settle()
    with pytest.raises(Overloaded):
        await caller.send(1, 2, 3)
    fits = caller.send(1, 2)
    await caller.release()
    await asyncio.gather(held, waiting, fits)
    assert await values_of(caller.send(1, 2, 3)) == [1, 2, 3]
    assert queue.waiting_windows == 0


async def test_a_cancelled_call_gives_its_place_back(caller: Caller, queue: DrainQueue, model: GatedModel) -> None:
    await caller.hold()
    leaving, staying = caller.send(1, 2), caller.send(3)
    await caller.settle()
    leaving.cancel()
    await caller.settle()
    assert queue.waiting_windows == 1
    await caller.release()
    assert await values_of(staying) == [3]
    assert model.batches == [[3]]


async def test_a_bad_call_fails_alone(caller: Caller, model: GatedModel) -> None:
    await caller.hold()
    calls = [caller.send(1), caller.send(POISON), caller.send(2, 3)]
    await caller.release()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Prediction, ModelFailed, Prediction]
    assert model.batches == [[1, POISON, 2, 3], [1], [POISON], [2, 3]]
    assert await values_of(caller.send(4)) == [4]


async def test_a_bad_call_that_was_alone_is_not_run_twice(caller: Caller, model: GatedModel) -> None:
    with pytest.raises(ModelFailed) as failed:
        await caller.send(POISON)
    assert "poisoned" not in failed.value.detail
    assert model.batches == [[POISON]]


class FullModel(GatedModel):
    """Has no memory for any batch."""

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        super().predict(windows, options)
        raise OutOfMemory("the device has no memory for this batch")


async def test_a_batch_without_memory_is_given_up_for_all_its_calls_and_not_run_again(queue: DrainQueue) -> None:
    caller = Caller(queue, model := FullModel())
    held = await caller.hold()
    calls = [caller.send(1), caller.send(2, 3)]
    await caller.release()
    answers = await asyncio.gather(held, *calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [OutOfMemory] * 3
    assert model.batches == [[1, 2, 3]]


async def test_an_engine_that_loses_a_window_answers_nobody_wrongly(queue: DrainQueue) -> None:
    with pytest.raises(ModelFailed):
        await queue.predict(ShortModel(), windows(1, 2), Options(), deadline=FAR)


async def test_progress_is_missed_only_while_there_is_work(caller: Caller, queue: DrainQueue, clock: FakeClock) -> None:
    clock.now += 60
    assert queue.stalled_s == 0
    held = await caller.hold()
    clock.now += 7
    assert queue.stalled_s == 7
    await caller.release()
    await held
    await caller.settle()
    assert queue.stalled_s == 0


async def test_load_is_windows_averaged_over_time(caller: Caller, queue: DrainQueue, clock: FakeClock) -> None:
    held = await caller.hold()  # one window runs
    clock.now += 5
    waiting = caller.send(1, 2, 3)
    await caller.settle()
    clock.now += 5  # one runs, three wait
    assert queue.mean_windows() == pytest.approx((1 * 5 + 4 * 5) / 10)
    await caller.release()
    await asyncio.gather(held, waiting)
    await caller.settle()
    queue.mean_windows()
    clock.now += 1
    assert queue.mean_windows() == 0


@pytest.fixture
def inline_queue(clock: FakeClock) -> Iterator[DrainQueue]:
    queue = DrainQueue(max_batch_windows=8, max_queue_windows=32, inline_windows=2, clock=clock)
    yield queue
    queue.close()


async def test_only_batches_up_to_the_inline_size_run_on_the_loop(inline_queue: DrainQueue) -> None:
    model = PlacedModel()
    for size in (2, 3):
        await Caller(inline_queue, model).send(*range(size))
    here, elsewhere = model.threads
    assert here == threading.get_ident() != elsewhere


async def test_an_answer_leaves_before_the_next_batch_blocks_the_loop(inline_queue: DrainQueue) -> None:
    model = PlacedModel()

    async def call(value: float, options: Options) -> None:
        await inline_queue.predict(model, windows(value), options, deadline=FAR)
        model.done.append(value)

    await asyncio.gather(call(1, Options()), call(2, Options(use_ensemble=False)))
    assert model.batches == [[1], [2]]
    assert model.done_before == [[], [1]]


async def test_on_the_loop_too_expired_and_cancelled_work_is_not_run(
    inline_queue: DrainQueue, clock: FakeClock
) -> None:
    model = PlacedModel()
    caller = Caller(inline_queue, model)
    model.gate.clear()
    held = caller.send(0, 0, 0)  # on the thread
    await asyncio.to_thread(model.entered.wait, 10)
    late, leaving, good = caller.send(1, deadline=101.0), caller.send(2), caller.send(3)
    await caller.settle()
    leaving.cancel()
    await caller.settle()
    clock.now = 102.0
    await caller.release()
    await held
    with pytest.raises(DeadlineExceeded):
        await late
    assert await values_of(good) == [3]
    assert model.batches[1:] == [[3]]
    assert inline_queue.waiting_windows == inline_queue.stalled_s == 0


async def test_on_the_loop_too_a_bad_call_fails_alone(inline_queue: DrainQueue, model: GatedModel) -> None:
    caller = Caller(inline_queue, model)
    answers = await asyncio.gather(caller.send(1), caller.send(POISON), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Prediction, ModelFailed]
    assert model.batches == [[1, POISON], [1], [POISON]]


class FailingModel(TimedModel):
    """Fails on every batch, after ten seconds of the clock for each window."""

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        self.clock.now += 10.0 * len(windows)
        self.batches.append(windows[:, 0, 0].tolist())
        raise RuntimeError("broken")


async def test_while_a_failed_batch_runs_singly_others_get_their_turn_and_progress_shows(clock: FakeClock) -> None:
    queue = DrainQueue(max_batch_windows=8, max_queue_windows=32, inline_windows=8, clock=clock)
    caller, seen = Caller(queue, model := FailingModel(clock)), set()
    calls = [caller.send(value) for value in range(4)]
    while not all(call.done() for call in calls):
        await asyncio.sleep(0)
        seen.add(len(model.batches))
        assert queue.stalled_s < 40.0
    assert seen >= {1, 2, 3, 4, 5}
    queue.close()


async def test_after_a_failed_batch_nothing_is_run_for_who_no_longer_waits(clock: FakeClock) -> None:
    queue = DrainQueue(max_batch_windows=8, max_queue_windows=32, inline_windows=8, clock=clock)
    caller = Caller(queue, model := FailingModel(clock))
    calls = [caller.send(value, deadline=deadline) for value, deadline in ((0, FAR), (1, 135.0), (2, FAR))]
    failures = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(failure) for failure in failures] == [ModelFailed, DeadlineExceeded, ModelFailed]
    assert model.batches == [[0, 1, 2], [0], [2]]
    queue.close()
