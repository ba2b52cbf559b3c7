from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from app.backends.base import Answer, Arm, Call
from app.backends.fake import FakeBackend, fake_prediction
from app.observability.metrics import Metrics
from app.rollout.dispatch import Served
from app.rollout.evidence import Evidence, Side
from app.rollout.shadow import (
    BUSY_QUEUE_MS,
    BUSY_REST_S,
    GATHER_WINDOWS,
    GROUP_WINDOWS,
    MAX_LAG_S,
    MAX_WAITING_WINDOWS,
    TIMEOUT_S,
    Setup,
    Shadow,
    position,
)
from serve_app.contract import N_FEATURES, N_STEPS, ModelFailed, Options
from tests.app.under_test import FakeClock

STABLE, CANARY = Arm("legacy"), Arm("ray_serve")


class Recorded:
    """What was counted."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.latencies: dict[str, list[float]] = {"stable": [], "canary": []}
        self.distances: list[float] = []
        self.gaps: list[float] = []

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def observe_latency(self, side: Side, seconds: float) -> None:
        self.latencies[side].append(seconds)

    def observe_distances(self, distances: Any) -> None:
        self.distances.extend(distances)

    def observe_gaps(self, gaps: Any) -> None:
        self.gaps.extend(gaps)


class Rig:
    """A shadow over two fake arms, with every string within reach."""

    def __init__(self, *, is_killed: Callable[[Call], bool] = lambda call: False, gather_s: float = 0.0) -> None:
        self.clock = FakeClock(100.0)
        self.legacy, self.ray_serve = FakeBackend("legacy"), FakeBackend("ray_serve")
        self.books, self.evidence = Recorded(), Evidence()
        self.is_leaving = False
        self.shadow = Shadow(
            {"legacy": self.legacy, "ray_serve": self.ray_serve},
            is_ready=lambda arm: {"legacy": self.legacy, "ray_serve": self.ray_serve}[arm.backend].ready,
            books=self.books,
            is_killed=is_killed,
            is_leaving=lambda: self.is_leaving,
            gather_s=gather_s,
            clock=self.clock,
        )
        self.configure()

    def configure(self, share: float = 1.0, canary: Arm = CANARY) -> None:
        self.shadow.configure(Setup(share, STABLE, canary, self.evidence))

    def offer(
        self, side: Side = "stable", *, n: int = 1, request_id: str = "a" * 32, queue_ms: float = 0.0, **served: Any
    ) -> None:
        windows = np.zeros((n, N_FEATURES, N_STEPS), np.float32)
        call = Call(windows, Options(), self.clock() + 1, request_id, "0" * 16)
        arm = STABLE if side == "stable" else CANARY
        answer = Answer(fake_prediction(n), {"queue": queue_ms, "model": 5.0})
        self.shadow.offer(call, Served(answer, arm, **served), side)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_the_other_arm_is_asked_and_what_both_say_is_evidence(rig: Rig) -> None:
    rig.offer("stable", n=2)
    rig.offer("canary", n=3)
    await rig.settle()
    assert [len(call.windows) for call in rig.ray_serve.calls] == [2]
    assert [len(call.windows) for call in rig.legacy.calls] == [3]
    assert rig.evidence["shadow_windows"] == 5
    assert rig.evidence["shadow_disagreements"] == 0
    assert rig.books.outcomes == {"compared": 2}
    assert (rig.books.distances, rig.books.gaps) == ([0.0] * 5, [0.0] * 5)


async def test_each_answer_is_counted_for_its_own_side(rig: Rig) -> None:
    up = replace(fake_prediction(1), classification_probs=np.array([[0, 0, 1]], np.float32))

    async def answer_up(call: Call) -> Answer:
        return Answer(up, {"model": 1.0})

    rig.legacy.predict = answer_up  # type: ignore[method-assign]
    rig.offer("canary")  # the canary said down; the stable arm is asked now
    await rig.settle()
    assert rig.evidence["shadow_pair_2_0"] == 1
    assert rig.evidence["shadow_disagreements"] == 1


async def test_an_offer_returns_before_anything_is_asked(rig: Rig) -> None:
    rig.ray_serve.gate.clear()
    rig.offer()
    assert rig.ray_serve.calls == []
    await rig.settle()
    assert len(rig.ray_serve.calls) == 1


@pytest.mark.parametrize("share", [0.0, None])
async def test_without_a_share_nobody_is_asked(rig: Rig, share: float | None) -> None:
    rig.shadow.configure(None if share is None else Setup(share, STABLE, CANARY, rig.evidence))
    rig.offer()
    await rig.settle()
    assert not rig.ray_serve.calls
    assert not rig.books.outcomes


def test_the_share_of_request_ids_is_that_of_the_plan() -> None:
    n = 20_000
    ids = [f"{i * 2654435761 % 2**128:032x}" for i in range(n)]
    for share in (0.01, 0.3, 0.9):
        chosen = sum(position(of) < share for of in ids)
        assert abs(chosen - n * share) < 4 * (n * share * (1 - share)) ** 0.5


async def test_one_group_is_under_way_at_a_time_and_its_first_call_alone(rig: Rig) -> None:
    rig.ray_serve.gate.clear()
    for _ in range(2 * GROUP_WINDOWS):
        rig.offer()
    asked = []
    for _ in range(4):
        await rig.settle()
        asked.append(len(rig.ray_serve.calls))
        rig.ray_serve.gate.set()  # for those that wait there now
        rig.ray_serve.gate.clear()
    assert asked == [1, GROUP_WINDOWS, GROUP_WINDOWS + 1, 2 * GROUP_WINDOWS]


async def test_latencies_are_of_calls_that_went_alone(rig: Rig) -> None:
    for side in ("stable", "canary", "stable"):
        rig.offer(side)
    await rig.settle()
    assert rig.books.outcomes == {"compared": 3}
    assert rig.books.latencies == {"stable": [0.005], "canary": [0.0]}


async def test_a_group_is_gathered_until_it_is_worth_its_while() -> None:
    rig = Rig(gather_s=60.0)
    for _ in range(GATHER_WINDOWS - 1):
        rig.offer()
    await rig.settle()
    assert not rig.ray_serve.calls
    rig.offer()
    await rig.settle()
    assert len(rig.ray_serve.calls) == GATHER_WINDOWS


async def test_what_is_forgotten_while_a_group_is_gathered_is_not_asked() -> None:
    rig = Rig(gather_s=60.0)
    rig.offer()
    await rig.settle()
    rig.shadow.configure(None)
    rig.configure()
    for _ in range(GATHER_WINDOWS):
        rig.offer(n=1, request_id="b" * 32)
    await rig.settle()
    assert {call.request_id for call in rig.ray_serve.calls} == {"b" * 32}
    assert rig.books.outcomes == {"compared": GATHER_WINDOWS}


async def test_what_may_wait_is_bounded_in_windows(rig: Rig) -> None:
    rig.ray_serve.gate.clear()
    for _ in range(4):
        rig.offer(n=MAX_WAITING_WINDOWS // 2)
    assert rig.books.outcomes == {"full": 2}
    rig.ray_serve.gate.set()
    await rig.settle()
    assert rig.books.outcomes == {"full": 2, "compared": 2}


async def test_a_request_of_more_windows_than_a_group_is_asked_by_itself(rig: Rig) -> None:
    rig.offer(n=GROUP_WINDOWS + 8)
    rig.offer()
    await rig.settle()
    assert rig.books.outcomes == {"compared": 2}


async def test_while_the_loop_is_late_the_shadow_rests(rig: Rig) -> None:
    rig.shadow.observe_lag(2 * MAX_LAG_S)
    rig.offer()
    await rig.settle()
    rig.shadow.observe_lag(0.0)
    rig.offer()
    await rig.settle()
    assert rig.books.outcomes == {"lag": 1, "compared": 1}


async def test_a_leaving_gateway_asks_nobody(rig: Rig) -> None:
    rig.is_leaving = True
    rig.offer()
    await rig.settle()
    assert not rig.ray_serve.calls
    assert rig.books.outcomes == {"leaving": 1}


async def test_the_kill_switch_stops_the_shadow() -> None:
    rig = Rig(is_killed=lambda call: call.principal == "0" * 16)
    rig.offer()
    await rig.settle()
    assert not rig.ray_serve.calls
    assert rig.books.outcomes == {"killed": 1}


async def test_an_arm_that_is_not_ready_is_not_asked(rig: Rig) -> None:
    rig.ray_serve.ready = False
    rig.offer()
    await rig.settle()
    assert not rig.ray_serve.calls
    assert rig.books.outcomes == {"not-ready": 1}


async def test_an_arm_that_keeps_live_calls_waiting_is_left_alone_for_a_while(rig: Rig) -> None:
    rig.offer("canary", queue_ms=2 * BUSY_QUEUE_MS)  # a live call waited for Ray Serve
    await rig.settle()
    rig.offer("stable")
    await rig.settle()
    assert not rig.ray_serve.calls
    assert rig.books.outcomes == {"compared": 1, "busy": 1}
    rig.clock.advance(BUSY_REST_S)
    rig.offer("stable")
    await rig.settle()
    assert len(rig.ray_serve.calls) == 1


async def test_what_has_waited_too_long_is_left_out(rig: Rig) -> None:
    rig.offer()
    rig.clock.advance(2 * TIMEOUT_S)
    await rig.settle()
    assert rig.books.outcomes == {"stale": 1}


async def test_failures_of_the_shadow_are_counted_and_nothing_else(rig: Rig) -> None:
    rig.ray_serve.error = ModelFailed("the model failed")
    rig.offer()
    await rig.settle()
    assert rig.books.outcomes == {"failed": 1}
    assert dict(rig.evidence.counts) == {}


async def test_an_unforeseen_failure_does_not_end_the_shadow(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.ray_serve.error = RuntimeError("nobody thought of it")
    rig.offer()
    await rig.settle()
    rig.ray_serve.error = None
    rig.offer()
    await rig.settle()
    assert rig.books.outcomes == {"failed": 1, "compared": 1}
    assert "unforeseen" in caplog.text


async def test_what_a_fallback_answered_is_not_asked_again(rig: Rig) -> None:
    rig.offer("stable", fallback="model-failed")
    await rig.settle()
    assert not rig.ray_serve.calls
    assert rig.books.outcomes == {"fallback": 1}


async def test_an_answer_of_another_version_is_not_compared(rig: Rig) -> None:
    async def answer_old(call: Call) -> Answer:
        return Answer(fake_prediction(1, version="3"))

    rig.configure(canary=Arm("ray_serve", "4"))
    rig.ray_serve.predict = answer_old  # type: ignore[method-assign]
    rig.offer()
    await rig.settle()
    assert rig.books.outcomes == {"other-version": 1}
    assert rig.evidence["shadow_windows"] == 0


async def test_the_arm_is_asked_for_its_version_under_a_name_of_the_shadows_own(rig: Rig) -> None:
    rig.configure(canary=Arm("ray_serve", "4"))
    rig.offer()
    await rig.settle()
    (call,) = rig.ray_serve.calls
    assert (call.version, call.principal, call.has_fallback) == ("4", "shadow", False)
    assert call.deadline == rig.clock() + TIMEOUT_S


async def test_what_was_asked_for_an_ended_plan_is_no_evidence(rig: Rig) -> None:
    rig.ray_serve.gate.clear()
    rig.offer()
    await rig.settle()
    rig.configure()
    rig.ray_serve.gate.set()
    await rig.settle()
    assert rig.evidence["shadow_windows"] == 0


async def test_stopping_gives_up_what_is_under_way(rig: Rig) -> None:
    rig.ray_serve.gate.clear()
    rig.offer()
    await rig.settle()
    await rig.shadow.stop()
    assert rig.ray_serve.cancelled == 1
    rig.offer()
    await rig.settle()
    assert len(rig.ray_serve.calls) == 1


async def test_the_metrics_take_what_the_shadow_counts(rig: Rig) -> None:
    metrics = Metrics()
    rig.shadow._books = metrics.rollout
    rig.offer(n=2)
    await rig.settle()
    text = metrics.exposition().decode()
    assert 'gateway_shadow_requests_total{outcome="compared"} 1.0' in text
    assert "gateway_shadow_distance_count 2.0" in text
    assert 'gateway_shadow_latency_seconds_count{side="canary"} 1.0' in text
