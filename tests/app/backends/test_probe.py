"""The prober: what it asks, how often, and what its report says of arms that answer, fail or hang."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from app.backends.breaker import Guarded
from app.backends.fake import FakeBackend
from app.backends.probe import Prober
from serve_app.contract import NotReady, Overloaded, as_windows

from .hand_driven import HandDrivenLoop, drive


def prober(loop: HandDrivenLoop, *backends: FakeBackend) -> Prober:
    arms = [Guarded(backend, clock=loop.time) for backend in backends]
    return Prober(arms, clock=loop.time, wall_clock=lambda: loop.time() + 1e9)


def test_before_the_first_check_nothing_is_known() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        report = prober(loop, FakeBackend()).report()
        assert (report["status"], report["is_healthy"], report["last_check"]) == ("unknown", False, None)

    drive(scenario)


def test_a_check_is_one_valid_window_with_a_deadline_and_always_the_same() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        subject = prober(loop, backend)
        await subject.check()
        await subject.check()
        first, second = backend.calls
        assert as_windows(first.windows).shape == (1, 50, 60)
        assert np.array_equal(first.windows, second.windows)
        assert first.deadline == loop.now + 2.0

    drive(scenario)


def test_all_arms_healthy_is_healthy_with_the_time_of_the_check() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        subject = prober(loop, FakeBackend("ray_serve"), FakeBackend("legacy"))
        await subject.check()
        report = subject.report()
        assert (report["status"], report["is_healthy"]) == ("healthy", True)
        assert report["last_check"] == loop.now + 1e9
        assert [(row["arm"], row["status"]) for row in report["arms"]] == [
            ("ray_serve", "healthy"),
            ("legacy", "healthy"),
        ]

    drive(scenario)


def test_one_arm_down_is_degraded_and_names_the_arms_error() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        down, up = FakeBackend("ray_serve"), FakeBackend("legacy")
        down.error = NotReady("there is no Ray cluster")
        subject = prober(loop, down, up)
        await subject.check()
        report = subject.report()
        assert report["status"] == "degraded"
        assert [(row["status"], row["error"]) for row in report["arms"]] == [
            ("unhealthy", "not-ready"),
            ("healthy", None),
        ]

    drive(scenario)


def test_no_arm_answering_is_unhealthy_and_unforeseen_errors_show_a_code_only() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        backend.error = RuntimeError("/secret/path")
        subject = prober(loop, backend)
        await subject.check()
        report = subject.report()
        assert report["status"] == "unhealthy"
        assert "secret" not in str(report)

    drive(scenario)


async def pass_time(loop: HandDrivenLoop, seconds: float) -> None:
    for _ in range(round(seconds / 0.1)):
        await loop.advance(0.1)


def test_checks_repeat_every_period_and_twice_a_second_while_an_arm_is_down() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        backend.error = NotReady()
        subject = prober(loop, backend)
        await subject.start()
        await pass_time(loop, 0.6)
        assert len(backend.calls) == 2
        backend.error = None
        await pass_time(loop, 0.6)
        await pass_time(loop, 4.6)
        assert len(backend.calls) == 3
        await pass_time(loop, 0.6)
        assert len(backend.calls) == 4
        await subject.stop()
        await loop.advance(60.0)
        assert len(backend.calls) == 4

    drive(scenario)


def test_an_arm_that_hangs_holds_up_no_other_arms_checks() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        stuck, up = FakeBackend("ray_serve"), FakeBackend("legacy")
        stuck.gate.clear()
        subject = prober(loop, stuck, up)
        await subject.start()
        await pass_time(loop, 11)
        assert (len(stuck.calls), len(up.calls)) == (1, 3)
        await subject.stop()

    drive(scenario)


def test_an_arm_that_says_it_is_back_is_checked_within_a_moment() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        backend.ready = False
        subject = prober(loop, backend)
        await subject.start()
        await loop.settle()
        assert subject.report()["status"] == "unhealthy"
        backend.ready = True
        await pass_time(loop, 0.2)
        assert len(backend.calls) == 2
        assert subject.report()["arms"][0]["status"] == "degraded"
        await subject.stop()

    drive(scenario)


def test_an_arm_that_says_it_cannot_answer_is_unhealthy_whatever_it_answered_before() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        subject = prober(loop, backend)
        await subject.check()
        backend.ready = False
        report = subject.report()
        assert (report["status"], report["error"]) == ("unhealthy", "not-ready")

    drive(scenario)


def test_an_arm_that_was_not_asked_lately_is_unknown() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        subject = prober(loop, FakeBackend())
        await subject.check()
        await loop.advance(31.0)
        assert subject.report()["status"] == "unknown"

    drive(scenario)


@pytest.mark.parametrize("slow_s", [0.5])
def test_a_slow_arm_is_degraded(slow_s: float) -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        backend.gate.clear()
        subject = prober(loop, backend)
        checking = asyncio.ensure_future(subject.check())
        await loop.advance(slow_s)
        backend.gate.set()
        await checking
        report = subject.report()
        assert report["status"] == "degraded"
        assert report["latency_ms"] == pytest.approx(500.0)

    drive(scenario)


def test_a_probe_that_was_shed_is_no_outcome() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = FakeBackend()
        subject = prober(loop, backend)
        await subject.check()
        backend.error = Overloaded()
        for _ in range(3):
            await subject.check()
        assert subject.report()["status"] == "healthy"

    drive(scenario)
