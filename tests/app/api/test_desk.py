from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

import pytest

from app.api.desk import GOOD_S, MAX_REPORTS, Desk
from app.errors import StateUnavailable
from app.rollout.experiment_log import AssignmentLog, Cell, Labelled, Outcome
from serve_app.contract import DeadlineExceeded
from tests.app.under_test import FakeClock, GatewayUnderTest


class SlowLog:
    """Is read when it is let; knows how often that was, and how often at the same time."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.read_since: list[float] = []
        self.most_at_once = 0
        self._under_way = 0

    def read(self, since: float) -> list[Cell]:
        self.read_since.append(since)
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        self.gate.wait(30)
        self._under_way -= 1
        if self.fault is not None:
            raise self.fault
        return []

    def label(self, outcomes: Sequence[Outcome]) -> Labelled:
        return Labelled(len(outcomes), 0, 0)


@pytest.fixture
def log() -> Iterator[SlowLog]:
    log = SlowLog()
    yield log
    log.gate.set()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(0.0)


@pytest.fixture
async def desk(log: SlowLog, clock: FakeClock) -> AsyncIterator[Desk]:
    desk = Desk(cast(AssignmentLog, log), clock=clock)
    yield desk
    await desk.stop()


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


async def test_reports_are_made_one_after_the_other(desk: Desk, log: SlowLog) -> None:
    log.gate.clear()
    reports = [asyncio.create_task(desk.report(float(since))) for since in range(MAX_REPORTS)]
    await until(lambda: log.read_since)
    log.gate.set()
    assert [report["since"] for report in await asyncio.gather(*reports)] == [float(n) for n in range(MAX_REPORTS)]
    assert log.most_at_once == 1


async def test_however_many_ask_a_report_is_made_once_in_some_seconds(
    desk: Desk, log: SlowLog, clock: FakeClock
) -> None:
    await asyncio.gather(*(desk.report(0.0) for _ in range(50)))
    clock.advance(GOOD_S - 0.1)
    await desk.report(0.0)
    assert log.read_since == [0.0]
    clock.advance(0.1)
    await desk.report(0.0)
    assert log.read_since == [0.0, 0.0]


async def test_who_asks_for_one_report_too_many_is_refused_and_the_others_are_not(desk: Desk, log: SlowLog) -> None:
    log.gate.clear()
    reports = [asyncio.create_task(desk.report(float(since))) for since in range(MAX_REPORTS)]
    await until(lambda: log.read_since)
    with pytest.raises(StateUnavailable, match="too many"):
        await desk.report(99.0)
    log.gate.set()
    await asyncio.gather(*reports)
    assert (await desk.report(99.0))["since"] == 99.0


async def test_who_has_waited_too_long_is_told_and_the_report_is_there_for_the_next(log: SlowLog) -> None:
    log.gate.clear()
    desk = Desk(cast(AssignmentLog, log), clock=FakeClock(0.0), report_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await desk.report(0.0)
    log.gate.set()
    report = None
    while report is None:
        with suppress(DeadlineExceeded):  # on a busy machine the rest of it may take so long
            report = await desk.report(0.0)
    assert log.read_since == [0.0]
    await desk.stop()


@pytest.mark.parametrize("fault", [sqlite3.OperationalError("disk I/O error"), OSError("gone")])
async def test_a_log_that_could_not_be_read_is_asked_again(desk: Desk, log: SlowLog, fault: Exception) -> None:
    log.fault = fault
    with pytest.raises(StateUnavailable):
        await desk.report(0.0)
    log.fault = None
    assert (await desk.report(0.0))["arms"] == ()


async def test_outcomes_do_not_wait_for_a_report(desk: Desk, log: SlowLog) -> None:
    log.gate.clear()
    reporting = asyncio.create_task(desk.report(0.0))
    await until(lambda: log.read_since)
    assert await desk.label([Outcome("f" * 32, 0, 1, None)]) == Labelled(1, 0, 0)
    log.gate.set()
    await reporting


async def test_a_desk_that_ends_does_not_wait_for_reports(desk: Desk, log: SlowLog) -> None:
    log.gate.clear()
    reports = [asyncio.create_task(desk.report(float(since))) for since in range(2)]
    await until(lambda: log.read_since)
    await desk.stop()
    await asyncio.wait({reports[1]}, timeout=5)
    assert reports[1].cancelled()
    log.gate.set()
    await reports[0]


async def test_reports_and_outcomes_leave_the_threads_that_all_share_alone(
    gateway: GatewayUnderTest, log: SlowLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    its_log = gateway.app.state.gateway.experiment.log
    monkeypatch.setattr(its_log, "read", log.read)
    monkeypatch.setattr(its_log, "label", lambda _: (log.read(0.0), Labelled(1, 0, 0))[1])
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    log.gate.clear()
    outcomes = [{"request_id": "f" * 32, "class": 1}]
    asking = [
        asyncio.create_task(gateway.client.get("/rollout/report", headers=gateway.bearer("ops"))),
        asyncio.create_task(gateway.client.post("/rollout/outcomes", json=outcomes, headers=gateway.bearer("admin"))),
    ]
    await until(lambda: len(log.read_since) == 2)
    async with asyncio.timeout(10):  # as a rollback's record does
        await asyncio.to_thread(lambda: None)
    log.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]
