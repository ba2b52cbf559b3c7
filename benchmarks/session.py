"""One session: start a system, make sure that it computes the right numbers, measure its cells, end it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from app.bench.inputs import draw_windows
from benchmarks.cpu import family, machine_busy_s, spent_by_role, used_s
from benchmarks.open_loop import open_loop, poisson_arrivals
from benchmarks.peers.catalogue import Model
from benchmarks.processes import NotUp
from benchmarks.request import Measured, Request
from benchmarks.rounds import Cell, Session
from benchmarks.systems import Running, System
from benchmarks.wrk import WrkFailed, closed_loop
from serve_app.contract import FloatArray, Options
from serve_app.engine import Engine

OPEN_SHARE = 0.8  # of the measured peak
WARM_UP_REQUESTS = 100
_WARM_UP_CONNECTIONS = 32
_WARM_UP_S = 3.0
_PEAK_S = 1.0
_TOLERANCE = 1e-4

Row = dict[str, Any]


class WrongNumbers(Exception):
    """A system answered something else than our engine; the message is one line."""


# What makes a cell or a session give no figures; the others are measured all the same.
UNMEASURED = (NotUp, WrongNumbers, WrkFailed, httpx.HTTPError, OSError, ValueError)


@dataclass
class Bench:
    """What sessions have in common.

    Attributes:
        systems: By name.
        models: By key.
        folder: For logs; every session makes one of its own below it.
        engines: Our own engine by the key of its model, for the right numbers.
        say: Told one line after each step.
        starts_s: Seconds that each system took to come up, as last seen.
        seed: Of windows and arrivals.
    """

    systems: dict[str, System]
    models: dict[str, Model]
    folder: Path
    engines: dict[str, Engine]
    say: Callable[[str], None]
    starts_s: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def windows(self, count: int) -> FloatArray:
        """float32[count,F,T], drawn from the shipped bars; always the same."""
        (windows,) = draw_windows(1, count, self.seed)
        return windows

    @contextmanager
    def running(self, system: str, model: str) -> Iterator[Running]:
        """A system that is up on a model; its start is timed. Raises `NotUp`."""
        folder = Path(tempfile.mkdtemp(prefix=f"{system}-{model}-", dir=self.folder))
        began = time.monotonic()
        with self.systems[system].start(self.models[model], folder) as up:
            self.starts_s[system] = time.monotonic() - began
            yield up

    def prepare(self, up: Running, model: str, cell: Cell) -> Request:
        """The request of a cell; before the first of its kind its answer is compared and the way warmed up.

        Raises:
            WrongNumbers: The answer is not 200, or not what our engine computes.
        """
        kind = (cell.lane, cell.windows)
        if kind not in up.prepared:
            up.prepared[kind] = self._prepare(up, model, cell)
        return up.prepared[kind]

    def _prepare(self, up: Running, model: str, cell: Cell) -> Request:
        windows = self.windows(cell.windows)
        request = up.request(cell.lane, windows)
        verify(up, cell.lane, request, self.engines[model].predict(windows, Options()).classification_probs)
        open_loop(request, np.zeros(WARM_UP_REQUESTS), connections=_WARM_UP_CONNECTIONS, drain_s=_WARM_UP_S)
        return request


def measure_session(
    bench: Bench, session: Session, *, seconds: int, once: Sequence[Callable[[Running], None]] = ()
) -> list[Row]:
    """The rows of one session; a system that does not come up or answers wrongly gives a row that says so.

    Args:
        bench: What sessions share.
        session: The system, its model and its cells.
        seconds: Of each load.
        once: Called when the cells are measured, while the system is still up.
    """
    named = {"system": session.system, "model": session.model}
    rows: list[Row] = []
    try:
        with bench.running(session.system, session.model) as up:
            bench.say(f"  {session.system} on {session.model}: up after {bench.starts_s[session.system]:.1f} s")
            for cell in session.cells:
                rows += [{**named, **row} for row in _measure_guarded(bench, up, session.model, cell, seconds)]
            for step in once:
                step(up)
    except UNMEASURED as error:
        bench.say(f"  {session.system} on {session.model}: {error}")
        rows.append({**named, "error": str(error)})
    return rows


def _measure_guarded(bench: Bench, up: Running, model: str, cell: Cell, seconds: int) -> list[Row]:
    """The rows of a cell, or one that says why there are none; the other cells are measured all the same."""
    try:
        return measure_cell(bench, up, model, cell, seconds)
    except UNMEASURED as error:
        bench.say(f"    {cell.lane}: {error}")
        return [{**_describe(cell), "error": f"{type(error).__name__}: {error}"}]


def measure_cell(bench: Bench, up: Running, model: str, cell: Cell, seconds: int) -> list[Row]:
    """The closed loop of a cell and, where asked for, the open loop at a share of the rate it reached."""
    request = bench.prepare(up, model, cell)
    closed = _account(up, cell, lambda: closed_loop(request, connections=cell.connections, seconds=seconds))
    rows = [closed]
    if cell.is_open and (peak_rps := open_peak_rps(request, cell, closed["answered_rps"])) > 0:
        due_s = poisson_arrivals(OPEN_SHARE * peak_rps, seconds, bench.seed)
        opened = _account(up, cell, lambda: open_loop(request, due_s, connections=cell.connections))
        rows.append({**opened, "peak_rps": peak_rps})
    for row in rows:
        bench.say(f"    {_line(row)}")
    return rows


def open_peak_rps(request: Request, cell: Cell, closed_rps: float) -> float:
    """The most requests per second that are answered while the open loop's generator sends them.

    It takes more CPU than wrk, so fast systems reach less beside it, and a share of wrk's figure could be more than
    all they can do.

    Args:
        request, cell: What is sent, over how many connections.
        closed_rps: What wrk reached: as many requests, all due at once, keep every connection busy for a second.
    """
    burst = open_loop(request, np.zeros(max(1, round(_PEAK_S * closed_rps))), connections=cell.connections)
    return min(burst.answered_rps, closed_rps)


def verify(up: Running, lane: str, request: Request, expected: FloatArray) -> None:
    """Compare the class probabilities in an answer with our engine's.

    Raises:
        WrongNumbers: They differ by more than 1e-4, or there are none.
    """
    response = httpx.request(
        request.method, request.url, headers=request.headers, content=request.body, trust_env=False, timeout=30.0
    )
    if response.status_code != httpx.codes.OK:
        raise WrongNumbers(f"answered {response.status_code}: {response.text[:200]!r}")
    found = up.lanes[lane].check(response.content)
    if found.shape != expected.shape or not np.allclose(found, expected, atol=_TOLERANCE):
        raise WrongNumbers(f"answered {found.tolist()!s:.100} where our engine computes {expected.tolist()!s:.100}")


def _account(up: Running, cell: Cell, load: Callable[[], Measured]) -> Row:
    """A load's figures, the CPU time that each role spent per answered request, and the cores that others took."""
    facts = up.facts()
    before, busy_before_s, began = used_s(family(up.roots)), machine_busy_s(), time.monotonic()
    measured = load()
    busy_s, wall_s = machine_busy_s() - busy_before_s, time.monotonic() - began
    spent = spent_by_role(before, used_s(family(up.roots)), up.role)
    spent["generator"] = measured.generator_cpu_s
    per_request = 1e3 / max(measured.answered, 1)
    return {
        **_describe(cell),
        **measured.row(),
        "windows_per_s": measured.answered_rps * cell.windows,
        "cpu_ms": {role: round(seconds * per_request, 4) for role, seconds in spent.items()},
        "foreign_cores": round(max(0.0, busy_s - sum(spent.values())) / wall_s, 3),
        "facts": _growth(facts, up.facts()),
    }


def _growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How far counters have come, nested as they are."""
    return {
        name: _growth(before.get(name, {}), value) if isinstance(value, dict) else value - before.get(name, 0)
        for name, value in after.items()
    }


def _describe(cell: Cell) -> Row:
    return {"lane": cell.lane, "connections": cell.connections, "windows": cell.windows}


def _line(row: Row) -> str:
    ms = row["latency_ms"]
    tail = f"p50 {ms['p50']:.2f} ms, p99 {ms['p99']:.2f} ms" if ms["p50"] is not None else "no answer"
    failed = f", failed {row['failed']}" if row["failed"] else ""
    what = f"{row['lane']}, {row['connections']} connections, windows {row['windows']}, {row['loop']} loop"
    return f"{what}: {row['answered_rps']:.0f} requests/s, {tail}{failed}"
