"""The assignment log: who was answered what by which arm, and what the market did then, in one SQLite file.

All workers of a gateway write to the file. It is bounded by age and by size: the oldest requests go first.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from app.rollout.evidence import Side
from serve_app.contract import CLASSES, Prediction

Floats = npt.NDArray[np.float64]

FILE_NAME = "experiment.sqlite"
MAX_TAG_CHARS = 64

_BUSY_TIMEOUT_S = 1.0
_CHUNK_ROWS = 2000
_N_COLUMNS = 2 + len(CLASSES) + 4  # cell, caller, probabilities, mean, deviation, label, return
_MAX_PRUNED = 5000  # requests at a time: a long deletion would keep other workers waiting

# A class is its index in `CLASSES`. Ids grow with time, so that the oldest requests are those of the lowest ids.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL UNIQUE,
    at REAL NOT NULL,
    side TEXT NOT NULL,
    arm TEXT NOT NULL,
    principal TEXT NOT NULL,
    tag TEXT
);
CREATE TABLE IF NOT EXISTS windows (
    request INTEGER NOT NULL REFERENCES requests (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    down REAL NOT NULL,
    flat REAL NOT NULL,
    up REAL NOT NULL,
    mean REAL NOT NULL,
    sd REAL,
    class INTEGER,
    return REAL,
    PRIMARY KEY (request, position)
) WITHOUT ROWID;
"""
_READ = """
SELECT side, arm, principal, down, flat, up, mean, sd, class, return
FROM requests JOIN windows ON windows.request = requests.id
WHERE at >= ? AND (class IS NOT NULL OR return IS NOT NULL)
"""


class Assignment(NamedTuple):
    """One answered request.

    Attributes:
        request_id: Ours.
        at: Seconds since the epoch.
        side: To which the caller belongs.
        backend: Who gave the answer.
        principal: Keyed hash of who asked.
        prediction: What was answered.
        tag: Symbol tag of the request.
    """

    request_id: str
    at: float
    side: Side
    backend: str
    principal: str
    prediction: Prediction
    tag: str | None


class Outcome(NamedTuple):
    """What the market did after one window; either value, or both.

    Attributes:
        request_id: Of the answer.
        window: Position in the request.
        label: Index in `CLASSES`.
        realized: Return over the horizon in units of its volatility, as the model predicts it.
    """

    request_id: str
    window: int
    label: int | None
    realized: float | None


class Labelled(NamedTuple):
    """What became of outcomes.

    Attributes:
        accepted: Told something new.
        unknown: Of a request or window that is not in the log: never, not yet, or not any more.
        duplicate: Known already; the first value of each kind counts.
    """

    accepted: int
    unknown: int
    duplicate: int


class Cell(NamedTuple):
    """The labelled windows of one side and arm; missing values are NaN, a missing label is -1.

    Attributes:
        side, arm: Which.
        n_requests: Answered requests, labelled or not.
        n_windows: Answered windows, labelled or not.
        principal: int64[N], the number of the caller among all callers.
        probs: float64[N, C].
        mean: float64[N].
        sd: float64[N].
        label: int64[N].
        realized: float64[N].
    """

    side: str
    arm: str
    n_requests: int
    n_windows: int
    principal: npt.NDArray[np.int64]
    probs: Floats
    mean: Floats
    sd: Floats
    label: npt.NDArray[np.int64]
    realized: Floats


class AssignmentLog:
    """The file, for one writing thread and any number of others who label and read.

    Args:
        path: Made with mode 0600 when the first request is written.
        max_age_s: Older requests are dropped.
        max_bytes: Of the file; beyond them the oldest requests are dropped.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self, path: Path, *, max_age_s: float, max_bytes: int, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._wall_clock = wall_clock
        self._writer: sqlite3.Connection | None = None

    def append(self, assignments: Sequence[Assignment]) -> None:
        """Write them, all or none, and drop what is too old or too much; by one thread alone.

        Raises:
            sqlite3.Error, OSError: The file is locked, the disk full, or the file is none of ours.
        """
        if self._writer is None:
            self._writer = self._open(make=True)
        try:
            with self._writer as connection:
                connection.execute("BEGIN IMMEDIATE")
                _insert(connection, assignments)
                self._prune(connection)
        except BaseException:
            self.close()  # a file that was taken away or damaged is opened anew
            raise

    def prune(self) -> None:
        """Drop what is too old though nothing new comes; by the writing thread. Raises as `append`."""
        if self._path.exists():
            self.append(())

    def close(self) -> None:
        """End writing; by the writing thread, or after it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def label(self, outcomes: Sequence[Outcome]) -> Labelled:
        """Join outcomes with what was answered; telling the same twice changes nothing.

        Raises:
            sqlite3.Error, OSError: As `append`; nothing was stored.
        """
        if not self._path.exists():
            return Labelled(0, len(outcomes), 0)
        with self._connected() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            found = [_label(connection, outcome) for outcome in outcomes]
        return Labelled(*(found.count(name) for name in Labelled._fields))

    def read(self, since: float) -> list[Cell]:
        """Everything answered at `since` seconds after the epoch or later, by side and arm.

        Raises:
            sqlite3.Error, OSError: The file cannot be read.
        """
        if not self._path.exists():
            return []
        with self._connected() as connection, connection:
            connection.execute("BEGIN")  # counts and windows are of one moment
            counts = _count(connection, since)
            return _cells(counts, connection.execute(_READ, (since,)))

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = self._open()
        try:
            yield connection
        finally:
            connection.close()

    def _open(self, *, make: bool = False) -> sqlite3.Connection:
        if make:  # SQLite would make it readable for others; its side files take over the mode
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA journal_size_limit = {self._max_bytes // 10}")
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prune(self, connection: sqlite3.Connection) -> None:
        oldest = self._wall_clock() - self._max_age_s
        first_kept = _value(connection, "SELECT id FROM requests WHERE at >= ? ORDER BY id LIMIT 1", oldest)
        first, last = connection.execute("SELECT min(id), max(id) FROM requests").fetchone()
        if first is None:
            return
        limit = last + 1 if first_kept is None else first_kept
        if _size_bytes(connection) > self._max_bytes:
            limit = max(limit, first + (last - first) // 20 + 1)
        connection.execute("DELETE FROM requests WHERE id < ?", (min(limit, first + _MAX_PRUNED),))


def _insert(connection: sqlite3.Connection, assignments: Sequence[Assignment]) -> None:
    first = 1 + (_value(connection, "SELECT max(id) FROM requests") or 0)
    connection.executemany(
        "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (id_, a.request_id, a.at, a.side, arm_of(a), a.principal, a.tag and a.tag[:MAX_TAG_CHARS])
            for id_, a in enumerate(assignments, first)
        ),
    )
    connection.executemany(
        "INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
        (
            (id_, position, *window)
            for id_, assignment in enumerate(assignments, first)
            for position, window in enumerate(_windows(assignment.prediction))
        ),
    )


def arm_of(assignment: Assignment) -> str:
    """`backend@version`, with the version that answered; without it where the backend does not tell."""
    version = assignment.prediction.model_version
    return f"{assignment.backend}@{version}" if version else assignment.backend


def _windows(prediction: Prediction) -> Iterator[tuple[float | None, ...]]:
    """Down, flat, up, mean and standard deviation of each window."""
    sds = prediction.regression_uncertainty
    for probs, mean, sd in zip(
        prediction.classification_probs.tolist(),
        prediction.regression_pred.tolist(),
        [None] * len(prediction) if sds is None else sds.tolist(),
        strict=True,
    ):
        yield *probs, mean, sd


def _label(connection: sqlite3.Connection, outcome: Outcome) -> str:
    """Which field of `Labelled` counts the outcome."""
    row = connection.execute(
        "SELECT request, class, return FROM requests JOIN windows ON windows.request = requests.id "
        "WHERE request_id = ? AND position = ?",
        (outcome.request_id, outcome.window),
    ).fetchone()
    if row is None:
        return "unknown"
    request, label, realized = row
    is_new = (label is None and outcome.label is not None) or (realized is None and outcome.realized is not None)
    if not is_new:
        return "duplicate"
    connection.execute(
        "UPDATE windows SET class = coalesce(class, ?), return = coalesce(return, ?) "
        "WHERE request = ? AND position = ?",
        (outcome.label, outcome.realized, request, outcome.window),
    )
    return "accepted"


def _count(connection: sqlite3.Connection, since: float) -> dict[tuple[str, str], tuple[int, int]]:
    """Requests and windows by side and arm."""
    rows = connection.execute(
        "SELECT side, arm, count(DISTINCT requests.id), count(*) "
        "FROM requests JOIN windows ON windows.request = requests.id WHERE at >= ? GROUP BY side, arm",
        (since,),
    )
    return {(side, arm): (n_requests, n_windows) for side, arm, n_requests, n_windows in rows}


def _cells(counts: dict[tuple[str, str], tuple[int, int]], rows: sqlite3.Cursor) -> list[Cell]:
    keys = sorted(counts)
    number = {key: i for i, key in enumerate(keys)}
    callers: dict[str, int] = {}
    chunks = [np.empty((0, _N_COLUMNS))]
    while chunk := rows.fetchmany(_CHUNK_ROWS):  # as Python's objects, all of them would take ten times the memory
        chunks.append(
            np.array(
                [
                    (number[side, arm], callers.setdefault(principal, len(callers)), *values)
                    for side, arm, principal, *values in chunk
                ],
                np.float64,  # None becomes NaN
            )
        )
    table = np.concatenate(chunks)
    return [_cell(key, counts[key], table[table[:, 0] == i]) for i, key in enumerate(keys)]


def _cell(key: tuple[str, str], counts: tuple[int, int], table: Floats) -> Cell:
    _, principal, *probs, mean, sd, label, realized = table.T
    return Cell(
        *key,
        *counts,
        principal=principal.astype(np.int64),
        probs=np.stack(probs, axis=1),
        mean=mean,
        sd=sd,
        label=np.where(np.isnan(label), -1, label).astype(np.int64),
        realized=realized,
    )


def _value(connection: sqlite3.Connection, query: str, *parameters: object) -> Any:
    row = connection.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def _size_bytes(connection: sqlite3.Connection) -> int:
    """Of what the file holds; free pages are used again."""
    pages, free, page_bytes = (
        _value(connection, f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)
