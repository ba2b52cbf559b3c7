"""Who runs when: sessions, their order in each round, and how long a cell may take inside the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")

NOOP, SMALL, SHIPPED = "noop", "about_1ms", "shipped"

# Seconds from the start of a system to its first answer, as a first guess; a round corrects it.
START_GUESS_S: Mapping[str, float] = {"sluice": 15.0, "document_stack": 15.0, "triton": 7.0, "bentoml": 8.0}
_OTHER_START_S = 6.0
_AROUND_S = 4.0  # checking the numbers, warming up, finding the peak, ending the processes
_LONGEST_CELL_S = 10


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement.

    Attributes:
        lane: How the system is asked.
        connections: How many.
        windows: Windows per request.
        is_open: Whether an open loop at a share of the closed loop's rate follows.
    """

    lane: str
    connections: int
    windows: int = 1
    is_open: bool = False

    @property
    def n_loads(self) -> int:
        return 2 if self.is_open else 1


@dataclass(frozen=True, slots=True)
class Session:
    """A system, up on one model, and what is measured before it ends."""

    system: str
    model: str
    cells: tuple[Cell, ...]


Lanes = Mapping[str, Sequence[str]]  # system → lanes, in the order of the first round

# What fits into a quarter of an hour; the rest of the catalogue is measured by the full run.
QUICK = ("document_stack", "sluice", "triton", "litserve", "bentoml", "mosec")
AHEAD = ("sluice", "triton")  # judged in every respect
OPEN = {("sluice", "json"), ("sluice", "binary"), ("triton", "binary")}  # lanes whose noop has an open loop


def quick_sessions(lanes: Lanes) -> tuple[Session, ...]:
    """What `make bench` measures: 1 and 32 connections, and of the served models what is comparable."""
    lanes = {name: own for name, own in lanes.items() if name in QUICK}
    noop = {name: _noop_cells(name, own) for name, own in lanes.items()}
    # The document's stack is compared where overhead is all there is; its start takes as long as ours.
    shipped = {name: _shipped_cells(name, own) for name, own in lanes.items() if name != "document_stack"}
    small = {
        name: (Cell("binary", 32, windows=8, is_open=True), Cell("binary", 32))
        for name in AHEAD
        if "binary" in lanes.get(name, ())
    }
    cells: Mapping[str, Mapping[str, tuple[Cell, ...]]] = {NOOP: noop, SMALL: small, SHIPPED: shipped}
    return tuple(Session(name, model, own) for model, by_system in cells.items() for name, own in by_system.items())


def _noop_cells(name: str, lanes: Sequence[str]) -> tuple[Cell, ...]:
    alone = [Cell(lane, 1) for lane in lanes if lane == "json" or (lane == "binary" and name in AHEAD)]
    return (*alone, *(Cell(lane, 32, is_open=(name, lane) in OPEN) for lane in lanes))


def _shipped_cells(name: str, lanes: Sequence[str]) -> tuple[Cell, ...]:
    if name in AHEAD:
        return (Cell("binary", 1), Cell("binary", 32, is_open=True))
    return (Cell("binary" if "binary" in lanes else "json", 32),)


def full_sessions(lanes: Lanes) -> tuple[Session, ...]:
    """What `make bench-full` measures: every system on every model in every lane, at 1, 8, 32 and 128 connections."""
    return tuple(
        Session(name, model, tuple(_full_cells(model, own)))
        for model in (NOOP, SMALL, SHIPPED)
        for name, own in lanes.items()
    )


def _full_cells(model: str, lanes: Sequence[str]) -> list[Cell]:
    cells = [Cell(lane, n, is_open=n == 32) for lane in lanes for n in (1, 8, 32, 128)]
    if model == SMALL:
        cells += [Cell(lane, 32, windows=8, is_open=True) for lane in lanes]
    return cells


def rotate(sessions: Sequence[Session], round_number: int) -> list[Session]:
    """The sessions of one round: models in their order, and for each the systems turned by one place per round.

    Systems that are compared run within minutes of one another, and none is always first.

    Args:
        sessions: Grouped by model.
        round_number: From 0.
    """
    groups = (list(group) for _, group in groupby(sessions, key=lambda session: session.model))
    return [session for group in groups for session in turned(group, round_number)]


def turned(things: Sequence[T], places: int) -> list[T]:
    """The things, begun so many places further on, so that over the rounds none is always first."""
    first = places % len(things)
    return [*things[first:], *things[:first]]


def around_s(sessions: Sequence[Session], starts_s: Mapping[str, float]) -> float:
    """Seconds of one round that are not measurement.

    Args:
        sessions: Of the round.
        starts_s: Start-up seconds by system, where known.
    """
    guesses = {**START_GUESS_S, **starts_s}
    return sum(guesses.get(session.system, _OTHER_START_S) + _AROUND_S for session in sessions)


def fit_cell_s(sessions: Sequence[Session], *, left_s: float, rounds: int, starts_s: Mapping[str, float]) -> int:
    """Whole seconds that each load of a round may take, so that the rounds fit; at least 1, at most 10.

    Args:
        sessions: Of one round.
        left_s: Time for all rounds together.
        rounds: How many rounds share it.
        starts_s: Start-up seconds by system, where known.
    """
    loads = sum(cell.n_loads for session in sessions for cell in session.cells)
    free_s = left_s / max(rounds, 1) - around_s(sessions, starts_s)
    return max(1, min(_LONGEST_CELL_S, int(free_s / max(loads, 1))))
