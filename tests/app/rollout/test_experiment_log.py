from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest

from app.backends.fake import fake_prediction
from app.rollout.evidence import Side
from app.rollout.experiment_log import FILE_NAME, Assignment, AssignmentLog, Labelled, Outcome
from serve_app.contract import Options
from tests.app.under_test import NOW, FakeClock

DAY_S = 86_400.0


def assignment(
    request_id: str, *, at: float = NOW, side: Side = "stable", n: int = 1, version: str = "3", principal: str = "p"
) -> Assignment:
    return Assignment(request_id, at, side, "legacy", principal, fake_prediction(n, version=version), None)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


def log_at(folder: Path, clock: FakeClock, *, max_bytes: int = 10_000_000) -> AssignmentLog:
    return AssignmentLog(folder / FILE_NAME, max_age_s=14 * DAY_S, max_bytes=max_bytes, wall_clock=clock)


@pytest.fixture
def log(tmp_path: Path, clock: FakeClock) -> AssignmentLog:
    return log_at(tmp_path, clock)


def request_ids(folder: Path) -> list[str]:
    connection = sqlite3.connect(folder / FILE_NAME)
    try:
        return [row[0] for row in connection.execute("SELECT request_id FROM requests ORDER BY id")]
    finally:
        connection.close()


def test_what_was_answered_is_read_back_by_side_and_arm(log: AssignmentLog) -> None:
    log.append([assignment("a", n=2), assignment("b", side="canary", version="4", principal="q")])
    log.label([Outcome("a", 1, 2, -0.5), Outcome("b", 0, 0, None)])
    canary, stable = log.read(0)
    assert (canary.side, canary.arm, canary.n_requests, canary.n_windows) == ("canary", "legacy@4", 1, 1)
    assert (stable.side, stable.arm, stable.n_requests, stable.n_windows) == ("stable", "legacy@3", 1, 2)
    assert stable.probs == pytest.approx(fake_prediction(2).classification_probs[1:])
    assert (stable.mean[0], stable.sd[0], stable.label[0], stable.realized[0]) == (pytest.approx(0.01), 1, 2, -0.5)
    assert canary.label.tolist() == [0]
    assert np.isnan(canary.realized).all()
    assert canary.principal[0] != stable.principal[0]


def test_the_file_is_its_owners_alone(log: AssignmentLog, tmp_path: Path) -> None:
    log.append([assignment("a")])
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 3  # with the write-ahead log and its index


def test_a_prediction_without_deviation_is_kept_without(log: AssignmentLog) -> None:
    prediction = fake_prediction(1, Options(return_uncertainty=False))
    log.append([assignment("a")._replace(prediction=prediction)])
    log.label([Outcome("a", 0, 1, None)])
    (cell,) = log.read(0)
    assert np.isnan(cell.sd).all()


def test_telling_an_outcome_again_changes_nothing(log: AssignmentLog) -> None:
    log.append([assignment("a")])
    assert log.label([Outcome("a", 0, 1, 0.1)]) == Labelled(1, 0, 0)
    assert log.label([Outcome("a", 0, 2, 9.9)]) == Labelled(0, 0, 1)
    (cell,) = log.read(0)
    assert (cell.label.tolist(), cell.realized.tolist()) == ([1], [0.1])


def test_class_and_return_may_come_one_after_the_other(log: AssignmentLog) -> None:
    log.append([assignment("a")])
    assert log.label([Outcome("a", 0, 1, None)]) == Labelled(1, 0, 0)
    assert log.label([Outcome("a", 0, 2, 0.4)]) == Labelled(1, 0, 0)  # the return is new, the first class counts
    (cell,) = log.read(0)
    assert (cell.label.tolist(), cell.realized.tolist()) == ([1], [0.4])


def test_outcomes_of_unknown_requests_and_windows_are_told_apart_from_known_ones(log: AssignmentLog) -> None:
    assert log.label([Outcome("a", 0, 1, None)]) == Labelled(0, 1, 0)  # there is no file yet
    log.append([assignment("a")])
    outcomes = [Outcome("a", 0, 1, None), Outcome("a", 1, 1, None), Outcome("b", 0, 1, None), Outcome("a", 0, 1, None)]
    assert log.label(outcomes) == Labelled(accepted=1, unknown=2, duplicate=1)


def test_an_empty_log_has_nothing_to_report(log: AssignmentLog) -> None:
    assert log.read(0) == []


def test_requests_before_the_beginning_do_not_count(log: AssignmentLog) -> None:
    log.append([assignment("a", at=NOW - 10), assignment("b")])
    log.label([Outcome("a", 0, 1, None), Outcome("b", 0, 1, None)])
    (cell,) = log.read(NOW - 5)
    assert (cell.n_requests, len(cell.label)) == (1, 1)


def test_what_is_too_old_goes_with_its_windows(log: AssignmentLog, clock: FakeClock, tmp_path: Path) -> None:
    log.append([assignment("old", n=3)])
    clock.advance(14 * DAY_S + 1)
    log.append([assignment("new", at=clock())])
    assert request_ids(tmp_path) == ["new"]
    (cell,) = log.read(0)
    assert cell.n_windows == 1


def test_what_is_too_old_goes_though_nothing_new_comes(log: AssignmentLog, clock: FakeClock, tmp_path: Path) -> None:
    log.prune()
    assert not (tmp_path / FILE_NAME).exists()
    log.append([assignment("a"), assignment("b")])
    clock.now += 14 * DAY_S - 1
    log.prune()
    assert request_ids(tmp_path) == ["a", "b"]
    clock.now += 2
    log.prune()
    assert request_ids(tmp_path) == []


def test_the_file_stays_within_its_size_and_the_oldest_go_first(tmp_path: Path, clock: FakeClock) -> None:
    log = log_at(tmp_path, clock, max_bytes=200_000)
    for batch in range(100):
        log.append([assignment(f"{batch:04d}-{i:04d}") for i in range(100)])
    kept = request_ids(tmp_path)
    assert 300 < len(kept) < 5000
    assert kept == sorted(kept)
    assert kept[-1] == "0099-0099"
    assert (tmp_path / FILE_NAME).stat().st_size < 300_000


def test_two_writers_share_the_file(tmp_path: Path, clock: FakeClock) -> None:
    one, other = log_at(tmp_path, clock), log_at(tmp_path, clock)
    for i in range(5):
        one.append([assignment(f"one-{i}")])
        other.append([assignment(f"other-{i}")])
    assert len(request_ids(tmp_path)) == 10


def test_a_batch_is_written_whole_or_not_at_all(log: AssignmentLog, tmp_path: Path) -> None:
    log.append([assignment("a")])
    with pytest.raises(sqlite3.IntegrityError):
        log.append([assignment("b"), assignment("a")])
    assert request_ids(tmp_path) == ["a"]
    log.append([assignment("c")])
    assert request_ids(tmp_path) == ["a", "c"]


def test_a_file_that_was_taken_away_is_made_anew(log: AssignmentLog, tmp_path: Path) -> None:
    log.append([assignment("a")])
    log.close()
    for path in tmp_path.iterdir():
        path.unlink()
    log.append([assignment("b")])
    assert request_ids(tmp_path) == ["b"]


def test_a_file_of_something_else_is_refused(log: AssignmentLog, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("no database, but long enough to be looked at" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        log.append([assignment("a")])
    with pytest.raises(sqlite3.DatabaseError):
        log.read(0)
