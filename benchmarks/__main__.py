"""`python -m benchmarks run|latency|report`: what `make bench` calls."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.peers.catalogue import ROOT
from benchmarks.processes import NotUp
from benchmarks.report import RESULTS_FILE, write_report
from benchmarks.rounds import SHIPPED, full_sessions, quick_sessions
from benchmarks.suite import Plan, Suite, all_models, all_systems, describe_plan, make_bench, measure_one_connection
from benchmarks.wrk import NoWrk, require_wrk

FOLDER = ROOT / ".bench"

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="Sluice beside its peers on this machine.")
out = Console(width=None if sys.stdout.isatty() else 180)  # tables of a dozen columns, unfolded in a log
err = Console(stderr=True, soft_wrap=True, highlight=False)

Engine = Annotated[str, typer.Option(help="Engine of the served models, the same for every system.")]


@cli.command()
def run(
    full: Annotated[
        bool, typer.Option("--full", help="Every system, every lane, 1, 8, 32 and 128 connections.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 3,
    seconds: Annotated[int | None, typer.Option(help="Of each load; default: what the budget allows.", min=1)] = None,
    budget: Annotated[float, typer.Option(help="Minutes for everything.", min=0.1)] = 14.8,
    only: Annotated[str, typer.Option(help="Systems, separated by commas; empty: all.")] = "",
    models: Annotated[str, typer.Option(help="Models, separated by commas; empty: all.")] = "",
    once: Annotated[bool, typer.Option(help="Measure what is measured once, too.")] = True,
    engine: Engine = "torch",
    into: Annotated[Path, typer.Option(help="Folder for results and report.")] = FOLDER,
) -> None:
    """Measure and report."""
    require_wrk()
    systems, served = all_systems(), all_models(engine)
    names, keys = _chosen(only, systems), _chosen(models, served)
    lanes = {name: systems[name].lanes for name in names}
    every = full_sessions(lanes) if full else quick_sessions(lanes)
    sessions = tuple(session for session in every if session.model in keys)
    plan = Plan(sessions, rounds, seconds, 60 * budget, once and "sluice" in names)
    err.print("\n".join(describe_plan(plan)))
    into.mkdir(parents=True, exist_ok=True)
    bench = make_bench(systems, served, FOLDER / "runs", err.print)
    Suite(bench, plan, into / RESULTS_FILE).run()
    report(into / RESULTS_FILE)


@cli.command()
def latency(
    calls: Annotated[int, typer.Option(help="Of each kind in each round.", min=10)] = 300, engine: Engine = "torch"
) -> None:
    """What gateway and Ray add to the bare engine at one connection."""
    models = {SHIPPED: all_models(engine)[SHIPPED]}
    bench = make_bench({"sluice": all_systems()["sluice"]}, models, FOLDER / "runs", err.print)
    with bench.running("sluice", SHIPPED) as up:
        print(json.dumps(measure_one_connection(bench, up, calls), indent=2))


@cli.command()
def report(
    results: Annotated[Path, typer.Argument(help="What a run wrote.", exists=True, dir_okay=False)] = FOLDER
    / RESULTS_FILE,
    into: Annotated[Path | None, typer.Option(help="Folder for the report; default: that of the results.")] = None,
) -> None:
    """Tables, goals and plots of a run, without measuring anything."""
    text = write_report(json.loads(results.read_text()), into or results.parent)
    out.print(Markdown(text))
    err.print(f"Wrote the report to {into or results.parent}")


def _chosen(words: str, known: Iterable[str]) -> list[str]:
    known = list(known)
    names = [word.strip() for word in words.split(",") if word.strip()] or known
    if unknown := [name for name in names if name not in known]:
        _fail(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def _fail(message: str) -> None:
    err.print(f"benchmarks: {message}", markup=False)
    sys.exit(1)


def main() -> None:
    """Entry point: what an operator can mend is one plain line; however it ends, so does all that was started."""
    asked_to_end = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        asked_to_end.append(signal.SIGHUP)
    for number in asked_to_end:
        signal.signal(number, signal.default_int_handler)  # every `with` is left, and ends what it started
    try:
        cli()
    except (NoWrk, NotUp) as error:
        _fail(str(error))


if __name__ == "__main__":
    main()
