"""A whole run: what is measured once, then the rounds, all inside a budget; results are written after every step."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bare import BATCHES, load_bare, time_bare
from benchmarks.machine import describe_machine
from benchmarks.model_lane import FOOTNOTE
from benchmarks.model_lane import run as run_model_lane
from benchmarks.one_connection import CALLS, measure_added
from benchmarks.peers.catalogue import PEERS, Model
from benchmarks.rounds import NOOP, SHIPPED, SMALL, Cell, Session, around_s, fit_cell_s, rotate
from benchmarks.session import Bench, Row, measure_cell, measure_session
from benchmarks.sluice import Sluice
from benchmarks.systems import PeerSystem, Running, System
from benchmarks.variants import about_1ms

SWEEP = (1, 2, 4, 8, 16, 32, 64, 128)
_SWEEP_S = 2
_BARE_S = 1.5
_ONCE_S = 45.0  # of the budget, for what is measured once
_OVERRUN_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures.

    Attributes:
        sessions: Of every round.
        rounds: How many.
        seconds: Of each load; None for what the budget allows.
        budget_s: For everything; past it by a minute no further session is begun.
        is_whole: Whether what is measured once is measured too.
    """

    sessions: tuple[Session, ...]
    rounds: int
    seconds: int | None
    budget_s: float
    is_whole: bool


def all_systems() -> dict[str, System]:
    """Sluice and every peer, by name."""
    systems: list[System] = [PeerSystem(PEERS["document_stack"]), Sluice()]
    systems += [PeerSystem(peer) for name, peer in PEERS.items() if name != "document_stack"]
    return {system.name: system for system in systems}


def all_models(engine: str) -> dict[str, Model]:
    """The models by key, as one engine serves them."""
    return {NOOP: Model(engine="noop"), SMALL: about_1ms(engine), SHIPPED: Model(engine=engine)}


class Suite:
    """One run and its results.

    Args:
        bench: Systems and models.
        plan: What is measured.
        output: The file of the results; rewritten after every step, so that a run that is ended keeps what it had.
    """

    def __init__(self, bench: Bench, plan: Plan, output: Path) -> None:
        self._bench = bench
        self._plan = plan
        self._output = output
        self._ends_at = time.monotonic() + plan.budget_s
        self.results: dict[str, Any] = {
            "machine": describe_machine(),
            "plan": {**asdict(plan), "sessions": len(plan.sessions)},
            "titles": {name: system.title for name, system in bench.systems.items()},
            "engines": {key: engine.name for key, engine in bench.engines.items()},
            "rows": [],
            "bare": [],
            "sweep": [],
        }

    def run(self) -> dict[str, Any]:
        """Measure everything; the results."""
        seconds = self._plan.seconds or 10
        if self._plan.is_whole:
            self._measure_model_lane()
        for number in range(self._plan.rounds):
            seconds = min(seconds, self._plan.seconds or self._fit(number))
            self._bench.say(f"Round {number + 1} of {self._plan.rounds}, {seconds} s per load, {self._left()}")
            self._measure_bare(number)
            for session in rotate(self._plan.sessions, number):
                self._measure(session, number, seconds)
        self.results["seconds_in_all"] = round(self._plan.budget_s - (self._ends_at - time.monotonic()), 1)
        self._write()
        return self.results

    def _fit(self, number: int) -> int:
        return fit_cell_s(
            self._plan.sessions,
            left_s=self._ends_at - time.monotonic() - (_ONCE_S if self._plan.is_whole and number == 0 else 0.0),
            rounds=self._plan.rounds - number,
            starts_s=self._bench.starts_s,
        )

    def _measure(self, session: Session, number: int, seconds: int) -> None:
        if time.monotonic() > self._ends_at + _OVERRUN_S:
            rows: list[Row] = [{"system": session.system, "model": session.model, "error": "no time was left for it"}]
        else:
            once = self._measured_once(session) if self._plan.is_whole and number == 0 else ()
            rows = measure_session(self._bench, session, seconds=seconds, once=once)
        self._keep("rows", [{"round": number, **row} for row in rows])

    def _measured_once(self, session: Session) -> tuple[Callable[[Running], None], ...]:
        """What is measured besides in the first round, while Sluice is up anyway."""
        steps = {("sluice", NOOP): self._measure_sweep, ("sluice", SHIPPED): self._measure_one_connection}
        step = steps.get((session.system, session.model))
        return () if step is None else (step,)

    def _measure_bare(self, number: int) -> None:
        used = {session.model for session in self._plan.sessions} - {NOOP}
        for key in sorted(used):
            for batch in BATCHES:
                timed = time_bare(self._bench.engines[key], self._bench.windows(batch), seconds=_BARE_S)
                self._keep("bare", [{"round": number, "model": key, **timed}])

    def _measure_sweep(self, up: Running) -> None:
        """The cost of a request by the number of connections."""
        for connections in SWEEP:
            self._keep("sweep", measure_cell(self._bench, up, NOOP, Cell("binary", connections), _SWEEP_S))

    def _measure_one_connection(self, up: Running) -> None:
        self.results["one_connection"] = measure_one_connection(self._bench, up, CALLS)
        self._write()

    def _measure_model_lane(self) -> None:
        self._bench.say("  models in process")
        self.results |= {"model_lane": run_model_lane(), "model_lane_note": FOOTNOTE}
        self._write()

    def _keep(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.results[table] += rows
        self._write()

    def _write(self) -> None:
        unfinished = self._output.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=1))
        unfinished.replace(self._output)

    def _left(self) -> str:
        return f"{(self._ends_at - time.monotonic()) / 60:.1f} minutes left"


def measure_one_connection(bench: Bench, up: Running, calls: int) -> dict[str, Any]:
    """What a running Sluice adds to the bare engine on the shipped model."""
    request = bench.prepare(up, SHIPPED, Cell("binary", 1))
    return measure_added(request, bench.engines[SHIPPED], bench.windows(1), calls=calls, say=bench.say)


def make_bench(systems: dict[str, System], models: dict[str, Model], folder: Path, say: Callable[[str], None]) -> Bench:
    """What all sessions share, our own engines loaded; what `auto` chose here is what every system is told to run."""
    shutil.rmtree(folder, ignore_errors=True)  # logs of the run before
    folder.mkdir(parents=True)
    engines = {key: load_bare(model) for key, model in models.items()}
    chosen = {key: replace(model, engine=engines[key].name) for key, model in models.items()}
    return Bench(systems, chosen, folder, engines, say)


def describe_plan(plan: Plan) -> list[str]:
    """The plan for the terminal, with what it will take."""
    loads = sum(cell.n_loads for session in plan.sessions for cell in session.cells)
    around = around_s(plan.sessions, {})
    once_s = _ONCE_S if plan.is_whole else 0.0
    seconds = plan.seconds or fit_cell_s(plan.sessions, left_s=plan.budget_s - once_s, rounds=plan.rounds, starts_s={})
    minutes = (once_s + plan.rounds * (around + loads * seconds)) / 60
    lines = [
        f"  {session.model}: {session.system}: {', '.join(map(_brief, session.cells))}" for session in plan.sessions
    ]
    return [
        f"{plan.rounds} rounds of {len(plan.sessions)} sessions with {loads} loads of {seconds} s, "
        f"about {minutes:.1f} minutes:",
        *lines,
    ]


def _brief(cell: Cell) -> str:
    windows = f"×{cell.windows}" if cell.windows > 1 else ""
    return f"{cell.lane}{windows}@{cell.connections}{' + open loop' if cell.is_open else ''}"
