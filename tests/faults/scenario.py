"""A fault as a scenario: what runs, a script of times and actions, and promises that its ledger must keep."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.laboratory import Laboratory
from tests.integration.open_loop import Load, Offer, Plan, Result, Stream
from tests.integration.processes import ROOT, GatewayProcess

PROBES = ("live", "ready")
LONGEST_S = 240.0


@dataclass
class Floor:
    """What a scenario runs on.

    Attributes:
        lab: Where its parts come from.
        gateway: Whom the load asks.
        parts: Whatever else its actions need, by name.
        notes: Figures that actions took down.
    """

    lab: Laboratory
    gateway: GatewayProcess
    parts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Step(NamedTuple):
    """Attributes: at_s: Seconds after the load's beginning before which it is not done."""

    at_s: float
    name: str
    act: Callable[[Floor], Any]


class Happening(NamedTuple):
    """When a step was done, seconds on the monotonic clock."""

    began: float
    ended: float


@dataclass
class Evidence:
    """All that a promise is judged by.

    Attributes:
        desks: The ledger of the requests for predictions.
        probes: That of `/health/live` and `/health/ready`.
        happened: The last of each step, by name.
    """

    desks: Load
    probes: Load
    happened: Mapping[str, Happening]
    floor: Floor

    def since(self, step: str, until: str | None = None, *, skip_s: float = 0.0) -> Load:
        """The predictions that were due between two steps, or a while after the first."""
        end = self.happened[until].ended if until else float("inf")
        return self.desks.between(self.happened[step].ended + skip_s, end)

    def probed(self, probe: str, step: str, until: str | None = None, *, skip_s: float = 0.0) -> Load:
        end = self.happened[until].ended if until else float("inf")
        return self.probes.of(probe).between(self.happened[step].ended + skip_s, end)


class Finding(NamedTuple):
    """One promise, judged. Attributes: recovery_s: Where the promise was about it."""

    kept: bool
    said: str
    recovery_s: float | None = None


Promise = Callable[[Evidence], Finding]


@dataclass(frozen=True)
class Scenario:
    """Attributes:
    name: A plain word or two, to choose it by.
    fault: What is done.
    promise: What callers are promised meanwhile, for people.
    stage: Sets up what it runs on.
    streams: The load.
    seconds: How long it is offered, at least; steps that take longer prolong it.
    tail_s: How long it goes on after the last step.
    script: Steps in the order of their times.
    promises: The same as rules; every one must be kept.
    """

    name: str
    fault: str
    promise: str
    stage: Callable[[Laboratory], Floor]
    streams: Callable[[Floor], list[Stream]]
    promises: Sequence[Promise]
    seconds: float = 10.0
    tail_s: float = 3.0
    script: Sequence[Step] = ()
    seed: int = 1


@dataclass(frozen=True)
class Row:
    """What the table says of one fault."""

    name: str
    fault: str
    promise: str
    kept: bool
    sent: int
    answers: dict[str, int]
    lost: int
    late: int
    p50_ms: float
    p99_ms: float
    recovery_s: float | None
    findings: list[str]
    took_s: float = 0.0
    date: str = ""
    commit: str = ""


def run(scenario: Scenario, lab: Laboratory, ledgers: Path) -> Row:
    """Do one scenario; one that cannot even be done is broken, and leaves a laboratory that others can use.

    Args:
        ledgers: Folder where `NAME.jsonl`, the ledger, and `NAME.log`, that of the gateway, are kept whatever happens.
    """
    began = time.monotonic()
    for kept in (ledger := ledgers / f"{scenario.name}.jsonl", log := ledgers / f"{scenario.name}.log"):
        kept.unlink(missing_ok=True)
    ledgers.mkdir(parents=True, exist_ok=True)
    try:
        row = _try(scenario, lab, ledger)
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(Exception):  # it has just been printed
            lab.renew()
        row = undone(scenario, f"{type(error).__name__}: {error}".splitlines()[0])
    if newest := lab.newest_log():
        shutil.copy(newest, log)
    return replace(row, took_s=time.monotonic() - began)


def _try(scenario: Scenario, lab: Laboratory, ledger: Path) -> Row:
    """Set up, offer the load, do the script, judge the ledger."""
    try:
        floor = scenario.stage(lab)
        floor.notes["workers"] = floor.gateway.worker_pids()
        evidence = _observe(scenario, floor, ledger)
        if floor.gateway.is_alive():
            floor.notes["workers at the end"] = floor.gateway.worker_pids()
        findings = [promise(evidence) for promise in scenario.promises]
    finally:
        lab.clear()
    return _row(scenario, evidence.desks, findings)


def _observe(scenario: Scenario, floor: Floor, ledger: Path) -> Evidence:
    offer = Offer(Plan(scenario.streams(floor), LONGEST_S, seed=scenario.seed))
    happened: dict[str, Happening] = {}
    try:
        for step in scenario.script:
            time.sleep(max(0.0, offer.began + step.at_s - time.monotonic()))
            began = time.monotonic()
            step.act(floor)
            happened[step.name] = Happening(began, time.monotonic())
        last_s = max(scenario.seconds, time.monotonic() - offer.began + scenario.tail_s)
        time.sleep(max(0.0, offer.began + last_s - time.monotonic()))
    finally:
        load = offer.finish(now=True)
        probes = load.of(*PROBES)
        desks = load.of(*{result.stream for result in load.results} - set(PROBES))
        evidence = Evidence(desks, probes, happened, floor)
        _keep(evidence, ledger)
    return evidence


def _keep(evidence: Evidence, file: Path) -> None:
    """One line for each step, request and probe, times in seconds since the load's beginning."""
    zero = evidence.desks.began
    steps = [
        {"step": name, "began": each.began - zero, "ended": each.ended - zero}
        for name, each in evidence.happened.items()
    ]
    requests = [
        {**result._asdict(), "due": result.due - zero, "sent": result.sent - zero, "ended": result.ended - zero}
        for load in (evidence.desks, evidence.probes)
        for result in load.results
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in (*steps, *requests)))


def is_lost(result: Result) -> bool:
    """No answer, a torn one, or a 5xx that is none of those with a meaning."""
    return result.status == 0 or (result.status >= 500 and result.status not in (502, 503, 504))


DEADLINE_S = 2.0
GRACE_S = 0.05


def is_late(result: Result, deadline_s: float = DEADLINE_S) -> bool:
    return result.answer_s > deadline_s + GRACE_S


def answer_of(result: Result) -> str:
    """What the table counts it as: its arm, its status, or how it was lost."""
    if result.status == 200:
        return result.arm or "200"
    return f"{result.status} {result.problem}".strip() if result.status else result.error


def undone(scenario: Scenario, why: str) -> Row:
    """What the table says of a scenario that could not be done: a promise that nobody saw kept is broken."""
    nothing, never = Load([], 0.0, 0.0), Finding(False, f"could not be done: {why}")
    return _row(scenario, nothing, [never])


def _row(scenario: Scenario, desks: Load, findings: Sequence[Finding]) -> Row:
    recoveries = [finding.recovery_s for finding in findings if finding.recovery_s is not None]
    return Row(
        name=scenario.name,
        fault=scenario.fault,
        promise=scenario.promise,
        kept=all(finding.kept for finding in findings),
        sent=len(desks.results),
        answers=dict(Counter(map(answer_of, desks.results)).most_common()),
        lost=sum(map(is_lost, desks.results)),
        late=sum(map(is_late, desks.results)),
        p50_ms=desks.answered_ms(50),
        p99_ms=desks.answered_ms(99),
        recovery_s=max(recoveries, default=None),
        findings=[("kept: " if finding.kept else "BROKEN: ") + finding.said for finding in findings],
        date=time.strftime("%Y-%m-%d"),
        commit=commit_of(ROOT),
    )


def commit_of(folder: Path) -> str:
    """The commit of a work tree, with a `+` where tracked files differ from it; empty outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "")
