"""When an arm is left alone, when it is asked again, and who is let through meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from app.backends.base import Answer, BackendStatus, Call, ExpiredInQueue
from app.backends.breaker import FORGOTTEN_S, MAX_VERSIONS, PROBE_PAUSE_S, STEP_S, Guarded, State
from app.backends.fake import FakeBackend
from serve_app.contract import (
    DeadlineExceeded,
    InvalidWindows,
    ModelFailed,
    ModelNotFound,
    ModelOutputInvalid,
    NotReady,
    Options,
    OutOfMemory,
    Overloaded,
    ReplicaLost,
    ServingError,
    Unavailable,
)

PATIENT_S, HASTY_S = 2.0, 0.1


class Rig:
    """A guarded arm, a clock that is moved by hand, and what the breaker told of itself."""

    def __init__(self) -> None:
        self.now = 100.0
        self.inner = FakeBackend()
        self.inner.versions = None
        self.changes: list[tuple[str, State, str]] = []
        self.arm = Guarded(self.inner, clock=lambda: self.now, on_change=lambda *change: self.changes.append(change))

    def call(self, timeout_s: float = PATIENT_S, *, has_fallback: bool = True, version: str | None = None) -> Call:
        windows = np.zeros((1, 50, 60), np.float32)
        return Call(windows, Options(), self.now + timeout_s, "r", "0" * 16, version, has_fallback=has_fallback)

    async def ask(self, **how: object) -> str:
        """The code of what became of one call, `ok` for an answer."""
        try:
            await self.arm.predict(self.call(**how))  # type: ignore[arg-type]
        except ServingError as error:
            return error.code
        return "ok"

    async def probe(self) -> str:
        try:
            await self.arm.probe(self.call())
            await asyncio.sleep(0)  # versions are asked beside it
        except ServingError as error:
            return error.code
        return "ok"

    async def fail(self, error: ServingError, times: int = 3, **how: object) -> None:
        """Have so many calls fail, some time after the last answer."""
        self.now += 1
        well, self.inner.error = self.inner.error, error
        for _ in range(times):
            await self.ask(**how)
        self.inner.error = well

    async def open(self) -> None:
        await self.ask()
        await self.fail(ReplicaLost())
        assert self.state == "open"

    @property
    def state(self) -> str:
        return str(self.arm.status().detail["breaker"]["state"])


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize("error", [ReplicaLost(), Unavailable(), DeadlineExceeded(), ServingError(), NotReady()])
async def test_the_third_failure_in_a_row_opens_and_the_arm_is_asked_no_more(rig: Rig, error: ServingError) -> None:
    await rig.fail(error, 2)
    assert rig.state == "closed"
    await rig.fail(error, 1)
    assert rig.state == "open"
    asked = len(rig.inner.calls)
    assert await rig.ask() == ("unavailable" if error.code in {"deadline-exceeded", "serving-error"} else error.code)
    assert len(rig.inner.calls) == asked


async def test_an_answer_in_between_forgives(rig: Rig) -> None:
    for _ in range(5):
        await rig.fail(ReplicaLost(), 2)
        await rig.ask()
    assert rig.state == "closed"


async def test_an_arm_of_which_a_part_answers_is_not_left_alone(rig: Rig) -> None:
    await rig.ask()
    rig.inner.error = ReplicaLost()
    for _ in range(10):
        await rig.ask()
    assert rig.state == "closed"
    rig.now += 1
    await rig.ask()
    assert rig.state == "open"


@pytest.mark.parametrize("error", [Overloaded(), ExpiredInQueue(), InvalidWindows(), ModelNotFound()])
async def test_our_own_shedding_and_the_callers_faults_say_nothing(rig: Rig, error: ServingError) -> None:
    await rig.fail(error, 20)
    assert rig.state == "closed"
    assert not rig.arm.status().detail["breaker"]["openings"]
    rig.inner.error = error
    assert [await rig.probe() for _ in range(3)] == [error.code] * 3
    assert rig.state == "closed"


@pytest.mark.parametrize(
    ("error", "timeout_s"),
    [
        (ModelFailed(), PATIENT_S),
        (ModelOutputInvalid(), PATIENT_S),
        (OutOfMemory(), PATIENT_S),
        (DeadlineExceeded(), HASTY_S),
    ],
)
async def test_what_may_be_the_callers_doing_opens_only_when_a_probe_fails_too(
    rig: Rig, error: ServingError, timeout_s: float
) -> None:
    await rig.probe()
    await rig.fail(error, 20, timeout_s=timeout_s)
    assert rig.state == "closed"
    assert rig.arm.wants_probe()
    assert await rig.probe() == "ok"
    assert rig.state == "closed"
    assert not rig.arm.wants_probe()
    await rig.fail(error, 3, timeout_s=timeout_s)
    rig.inner.error = error
    await rig.probe()
    assert rig.state == "open"
    rig.inner.error = None
    assert await rig.ask() == ("unavailable" if isinstance(error, DeadlineExceeded) else error.code)


async def test_two_probes_that_fail_in_a_row_open_without_any_call(rig: Rig) -> None:
    await rig.probe()
    rig.inner.error = DeadlineExceeded()
    await rig.probe()
    assert rig.state == "closed"
    await rig.probe()
    assert rig.state == "open"


async def test_an_arm_that_says_it_cannot_answer_is_open_at_once(rig: Rig) -> None:
    rig.inner.ready = False
    assert await rig.ask() == "not-ready"
    assert rig.state == "open"
    assert await rig.ask() == "not-ready"
    assert len(rig.inner.calls) == 1


async def test_readiness_follows_the_breaker(rig: Rig) -> None:
    assert rig.arm.status().ready
    await rig.open()
    status = rig.arm.status()
    assert (status.ready, status.reason) == (False, "replica-lost")
    assert (await rig.arm.stats())["breaker"]["openings"] == 1
    await rig.probe()
    assert rig.arm.status().ready


async def test_an_arm_is_no_fallback_while_the_breaker_of_what_would_answer_is_open(rig: Rig) -> None:
    await rig.fail(ReplicaLost(), version="7")
    assert (rig.arm.is_ready(), rig.arm.is_ready("7"), rig.arm.is_ready("8")) == (True, False, True)
    await rig.open()
    assert not rig.arm.is_ready()
    await rig.probe()
    assert rig.arm.is_ready()
    rig.inner.ready = False
    assert not rig.arm.is_ready()


async def test_only_a_probe_brings_an_open_arm_back(rig: Rig) -> None:
    await rig.open()
    rig.now += 60
    assert await rig.ask() == "replica-lost"
    assert await rig.probe() == "ok"
    assert await rig.ask() == "ok"


async def test_a_recovered_arm_gets_a_growing_share_of_those_whom_another_answers_too(rig: Rig) -> None:
    await rig.open()
    await rig.probe()
    shares = []
    for _ in range(4):
        answers = [await rig.ask() for _ in range(100)]
        shares.append(answers.count("ok"))
        rig.now += STEP_S
    assert shares == [pytest.approx(10, abs=1), pytest.approx(25, abs=1), pytest.approx(50, abs=1), 100]
    assert [state for _, state, _ in rig.changes] == [State.OPEN, State.RECOVERING, State.CLOSED]


async def test_whom_nobody_else_answers_is_let_through_at_once(rig: Rig) -> None:
    await rig.open()
    await rig.probe()
    assert rig.state == "recovering"
    assert [await rig.ask(has_fallback=False) for _ in range(50)] == ["ok"] * 50


async def test_an_arm_that_appears_for_the_first_time_is_not_held_back(rig: Rig) -> None:
    rig.inner.ready = False
    await rig.probe()
    rig.inner.ready = True
    await rig.probe()
    assert rig.state == "closed"


async def test_a_recovering_arm_that_fails_again_is_left_alone_again(rig: Rig) -> None:
    await rig.open()
    await rig.probe()
    await rig.fail(ReplicaLost(), 3, has_fallback=False)
    assert rig.state == "open"


async def test_a_probe_is_wanted_soon_after_a_fault_and_at_once_when_the_arm_says_it_is_back(rig: Rig) -> None:
    await rig.probe()
    assert not rig.arm.wants_probe()
    await rig.open()
    assert rig.arm.wants_probe()
    rig.inner.ready = False
    await rig.probe()
    assert not rig.arm.wants_probe()
    rig.inner.ready = True
    assert rig.arm.wants_probe()
    await rig.probe()
    await rig.fail(ModelFailed(), has_fallback=False)
    rig.now += PROBE_PAUSE_S
    assert rig.arm.wants_probe()


async def test_what_was_sent_before_the_recovery_says_nothing_of_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gates: list[asyncio.Future[None]] = []

    async def predict(call: Call) -> Answer:
        gates.append(asyncio.get_running_loop().create_future())
        await gates[-1]
        raise DeadlineExceeded

    honest = rig.inner.predict
    await rig.ask()
    monkeypatch.setattr(rig.inner, "predict", predict)
    stuck = [asyncio.ensure_future(rig.ask(has_fallback=False)) for _ in range(8)]
    await asyncio.sleep(0)
    monkeypatch.setattr(rig.inner, "predict", honest)
    await rig.fail(ReplicaLost())
    await rig.probe()
    rig.now += 1
    for gate in gates:
        gate.set_result(None)
    assert await asyncio.gather(*stuck) == ["deadline-exceeded"] * 8
    assert rig.state != "open"


# --- versions


async def test_a_version_that_fails_takes_neither_another_nor_the_default_with_it(rig: Rig) -> None:
    await rig.fail(ReplicaLost(), version="7")
    asked = len(rig.inner.calls)
    assert await rig.ask(version="7") == "replica-lost"
    assert len(rig.inner.calls) == asked
    assert await rig.ask(version="8") == "ok"
    assert await rig.ask() == "ok"
    assert rig.arm.status().ready
    assert rig.arm.status().detail["breaker"]["versions"] == {"7": "open"}


async def test_a_version_comes_back_by_probes_that_name_it(rig: Rig) -> None:
    await rig.fail(ReplicaLost(), version="7")
    assert rig.arm.wants_probe()
    await rig.probe()
    assert [call.version for call in rig.inner.calls[-2:]] == [None, "7"]
    assert await rig.ask(version="7") == "ok"


async def test_a_version_that_is_served_no_more_or_asked_for_no_more_is_forgotten(rig: Rig) -> None:
    await rig.fail(ReplicaLost(), version="7")
    rig.inner.versions = frozenset({"1"})
    await rig.probe()
    assert not rig.arm.wants_probe()
    rig.inner.versions = None
    await rig.fail(ReplicaLost(), version="7")
    rig.now += FORGOTTEN_S
    await rig.probe()
    assert not rig.arm.wants_probe()
    assert rig.inner.calls[-1].version is None


async def test_a_version_that_hangs_holds_up_no_probe_of_the_default(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    honest = rig.inner.predict

    async def predict(call: Call) -> Answer:
        asked.append(call.version)
        if call.version is not None:
            await asyncio.Event().wait()
        return await honest(call)

    await rig.fail(ReplicaLost(), version="7")
    monkeypatch.setattr(rig.inner, "predict", predict)
    async with asyncio.timeout(5):
        assert [await rig.probe() for _ in range(3)] == ["ok"] * 3
    assert asked.count("7") == 1
    await rig.arm.stop()


async def test_a_version_that_is_being_loaded_is_no_failure(rig: Rig) -> None:
    await rig.fail(NotReady(), 10, version="7")
    assert await rig.ask(version="7") == "ok"


async def test_versions_that_are_remembered_are_bounded(rig: Rig) -> None:
    for number in range(3 * MAX_VERSIONS):
        await rig.fail(ReplicaLost(), 1, version=str(number))
    assert len(rig.arm.status().detail["breaker"].get("versions", {})) <= MAX_VERSIONS


async def test_a_status_passes_through_with_the_breaker_beside_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    told = BackendStatus(False, "no-cluster", {"starts": 3}, None)
    status: Callable[[], BackendStatus] = lambda: told  # noqa: E731
    monkeypatch.setattr(rig.inner, "status", status)
    seen = rig.arm.status()
    assert seen == replace(told, detail={"starts": 3, "breaker": seen.detail["breaker"]})
