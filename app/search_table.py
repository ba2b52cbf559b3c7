"""The live table of a hyper-parameter search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from serve_app.train.search_card import TrialRow

_COLOURS = {"running": "yellow", "done": "green", "failed": "red"}


def render(trials: Sequence[TrialRow], n_trials: int) -> Group:
    """All trials that have begun, the best so far in bold, and below the table what the failed ones died of.

    Args:
        trials: In the order of their numbers.
        n_trials: How many there will be.
    """
    done = [trial for trial in trials if trial.status == "done"]
    failed = [trial for trial in trials if trial.status == "failed"]
    best = min(done, key=lambda trial: trial.loss, default=None)
    names = [name.replace("_", "\n") for name in trials[0].candidate] if trials else []
    title = f"{len(done) + len(failed)} of {n_trials} trials ended"
    table = Table("trial", *names, "status", "validation\nloss", "s", title=title, box=box.SIMPLE, padding=0)
    for trial in trials:
        table.add_row(*_cells(trial), style="bold" if trial is best else None)
    return Group(table, *(Text(f"trial {trial.number}: {trial.error}", style="red") for trial in failed))


def _cells(trial: TrialRow) -> list[str]:
    name = "0 base" if trial.number == 0 else str(trial.number)
    settings = [f"{value:.3g}" for value in trial.candidate.values()]
    status = f"[{_COLOURS[trial.status]}]{trial.status}[/]"
    loss = f"{trial.loss:.4f}" if trial.losses else ""
    return [name, *settings, status, loss, f"{trial.wall_time_s:.0f}"]
