"""`python -m benchmarks.rollout_judge`: false rollbacks and time to catch, in minutes, the same for the same seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.rollout_judge.report import PAGE, PICTURE, draw, write_page
from benchmarks.rollout_judge.study import fault_studies, kept_studies, run_all


def main(
    runs: Annotated[int, typer.Option(help="A/A runs; other studies have a tenth or less.", min=1)] = 2000,
    fault_runs: Annotated[int, typer.Option(help="Runs of each fault.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the first run.")] = 1,
    processes: Annotated[int, typer.Option(help="To run on.", min=1)] = 1,
    into: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(".bench/rollout_judge"),
) -> None:
    into.mkdir(parents=True, exist_ok=True)
    kept = run_all(kept_studies(runs), seed, processes, _tell)
    faults = run_all(fault_studies(fault_runs), seed, processes, _tell)
    (into / "results.json").write_text(json.dumps({"kept": kept, "faults": faults}))
    page = write_page(kept, faults)
    (into / PAGE).write_text(page)
    draw(faults, into / PICTURE)
    print(page)


def _tell(title: str) -> None:
    print(title, file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
