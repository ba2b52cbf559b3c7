from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from app.backends.base import Answer, Arm
from app.backends.fake import fake_prediction
from app.rollout.dispatch import Served
from app.rollout.experiment import Experiment
from app.rollout.experiment_log import FILE_NAME, AssignmentLog, Outcome
from tests.app.under_test import NOW, FakeClock

SERVED = Served(Answer(fake_prediction(2, version="4")), Arm("ray_serve"))


class Rig:
    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.path = folder / FILE_NAME
        self.losses: Counter[str] = Counter()
        clock = FakeClock(NOW)
        log = AssignmentLog(self.path, max_age_s=1e6, max_bytes=10_000_000, wall_clock=clock)
        self.experiment = Experiment(log, count_loss=self.count_loss, wall_clock=clock, **arguments)

    def count_loss(self, reason: str, count: int) -> None:
        self.losses[reason] += count

    def record(self, request_id: str) -> None:
        self.experiment.record(request_id, "p" * 16, "canary", SERVED, tag="AAPL")

    def n_requests(self) -> int:
        return sum(cell.n_requests for cell in self.experiment.log.read(0))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_what_was_recorded_is_in_the_log_when_the_gateway_has_stopped(rig: Rig) -> None:
    await rig.experiment.start()
    rig.record("a")
    await rig.experiment.stop()
    assert rig.experiment.log.label([Outcome("a", 1, 2, 0.3)]).accepted == 1
    (cell,) = rig.experiment.log.read(0)
    assert (cell.side, cell.arm, cell.n_requests, cell.n_windows) == ("canary", "ray_serve@4", 1, 2)
    connection = sqlite3.connect(rig.path)
    assert connection.execute("SELECT request_id, at, principal, tag FROM requests").fetchall() == [
        ("a", NOW, "p" * 16, "AAPL")
    ]
    connection.close()


async def test_a_gateway_without_an_experiment_makes_no_file(rig: Rig) -> None:
    await rig.experiment.start()
    await rig.experiment.stop()
    assert not rig.path.exists()


def test_recording_touches_no_disk(rig: Rig) -> None:
    rig.record("a")
    assert not rig.path.exists()


def test_what_waits_is_bounded_in_windows_and_the_rest_counted(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_queued_windows=7)
    for i in range(5):
        rig.record(str(i))
    assert rig.losses == {"queue-full": 2}
    rig.experiment.write()
    rig.record("later")
    rig.experiment.write()
    assert rig.n_requests() == 4


def test_a_locked_file_costs_the_batch_and_nothing_later(rig: Rig) -> None:
    rig.record("a")
    rig.experiment.write()
    other = sqlite3.connect(rig.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    rig.record("b")
    rig.experiment.write()
    assert rig.losses == {"locked": 1}
    other.execute("ROLLBACK")
    other.close()
    rig.record("c")
    rig.experiment.write()
    assert rig.n_requests() == 2


def test_a_disk_that_refuses_is_counted(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "missing")
    rig.record("a")
    rig.record("b")
    rig.experiment.write()
    assert rig.losses == {"disk": 2}
    (tmp_path / "missing").mkdir()
    rig.record("c")
    rig.experiment.write()
    assert rig.n_requests() == 1


def test_a_full_disk_is_counted(rig: Rig) -> None:
    rig.record("a")
    rig.experiment.write()
    writer = rig.experiment.log._writer
    assert writer is not None
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages}")  # SQLite says "disk is full" for this limit too
    for i in range(500):
        rig.record(f"b{i}")
    rig.experiment.write()
    assert rig.losses == {"disk": 500}
    rig.record("c")
    rig.experiment.write()
    assert rig.n_requests() == 2


def test_an_unforeseen_failure_is_counted_too(rig: Rig) -> None:
    rig.record("b")
    rig.experiment.log.append = _break  # type: ignore[method-assign]
    rig.experiment.write()
    assert rig.losses == {"unforeseen": 1}


def _break(assignments: object) -> None:
    raise ValueError("nobody thought of it")
