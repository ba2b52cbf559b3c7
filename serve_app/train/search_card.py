"""The card of a hyper-parameter search: what was tried, how it did, and why the winner's figure flatters it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One candidate and what is known of it.

    Attributes:
        number: From 0; 0 is the baseline.
        candidate: Its settings by name.
        status: Where it is.
        losses: Validation loss in nats for each seed fitted so far.
        wall_time_s: Since its start.
        error: One line, when it failed.
    """

    number: int
    candidate: dict[str, Any]
    status: Literal["running", "done", "failed"] = "running"
    losses: tuple[float, ...] = ()
    wall_time_s: float = 0.0
    error: str | None = None

    @property
    def loss(self) -> float:
        """Mean over the seeds fitted so far; not a number before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


@dataclass(frozen=True, slots=True)
class SearchReport:
    """All figures of one search, in plain values.

    Attributes:
        space: Range of each setting, in words.
        trials: In the order of their numbers.
        best: Number of the winner.
        seeds: Of the networks that each trial fitted.
        max_epochs: Of each fit.
        train_rows, validation_rows: Rows learned from and chosen by.
        validation_from, validation_until: First day of the block, and last day whose return it holds.
        first_test_day: First day of the first test block; nothing from it on was loaded.
        wall_time_s: Of the whole search.
    """

    space: dict[str, str]
    trials: list[TrialRow]
    best: int
    seeds: list[int]
    max_epochs: int
    train_rows: int
    validation_rows: int
    validation_from: str
    validation_until: str
    first_test_day: str
    wall_time_s: float


def render(report: SearchReport) -> str:
    """The card as Markdown."""
    paragraphs = "\n\n".join(part(report) for part in (_head, _trials, _meaning, _next)).split("\n\n")
    return "\n\n".join(_reflow(paragraph) for paragraph in paragraphs) + "\n"


def _head(report: SearchReport) -> str:
    return f"""# Hyper-parameter search, {len(report.trials)} trials

Every trial fitted one network for each of the seeds {", ".join(map(str, report.seeds))}, at most {report.max_epochs}
epochs long, to the {report.train_rows:,} training rows of the first walk-forward fold and was judged on that fold's
validation block: {report.validation_rows:,} rows from {report.validation_from} to {report.validation_until}. No bar
from {report.first_test_day} on, the first day of the first test block, was loaded. Loss: log-loss plus Gaussian NLL
in nats, as served, mean over the seeds.

{_table(("setting", "range"), [(_words(name), values) for name, values in report.space.items()])}"""


def _trials(report: SearchReport) -> str:
    rows = [
        (_name(trial, report.best), *(show(trial.candidate[name]) for name in report.space), *_outcome(trial))
        for trial in report.trials
    ]
    return f"""## Trials

{_table(("trial", *map(_words, report.space), "validation loss", "over the seeds", "seconds"), rows)}"""


def _meaning(report: SearchReport) -> str:
    baseline, best = report.trials[0], report.trials[report.best]
    if best is baseline:
        verdict = "No trial did better than the settings at hand; they stay."
    elif baseline.status == "failed":
        verdict = "The baseline failed, so there is nothing to compare the best trial with."
    else:
        gains = [before - after for before, after in zip(baseline.losses, best.losses, strict=True)]
        verdict = (
            f"Trial {best.number} is {baseline.loss - best.loss:.4f} nats below the baseline; seed by seed the "
            f"difference is {min(gains):+.4f} to {max(gains):+.4f}."
        )
        if min(gains) <= 0:
            verdict += " For one seed at least it is no better: the choice may be chance."
    return f"""## What it shows

{verdict}

**The winner's loss is too good to be true.** It is the least of {len(report.trials)} figures on the very rows that
chose it, and the same rows stopped each fit, weighted its members and scaled its variance: the more trials, the more it
flatters. Seeds show the noise of fitting, not that of the one year of days all trials share. What a setting is worth
shows on the test blocks, which nothing here has touched; judging several settings there and keeping the best would
spend them."""


def _next(report: SearchReport) -> str:
    return f"""## Use

`sluice train --config config.json` trains and judges with the settings of trial {report.best}. The search took
{report.wall_time_s / 60:.1f} minutes; all figures are in `trials.json`."""


def _name(trial: TrialRow, best: int) -> str:
    name = f"{trial.number}, baseline" if trial.number == 0 else str(trial.number)
    return f"**{name}**" if trial.number == best else name


def _outcome(trial: TrialRow) -> tuple[str, str, str]:
    seconds = f"{trial.wall_time_s:.0f}"
    if trial.status == "failed":
        return f"failed: {(trial.error or '').replace('|', '/')}", "", seconds
    return f"{trial.loss:.4f}", f"{min(trial.losses):.4f} to {max(trial.losses):.4f}", seconds


def show(value: Any) -> str:
    """A setting's value, to three digits."""
    return f"{value:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _reflow(paragraph: str) -> str:
    return paragraph if paragraph[0] in "#|" else textwrap.fill(paragraph, width=100, break_on_hyphens=False)
