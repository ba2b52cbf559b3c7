"""`make faults`: every fault in turn, and the table of what became of the requests meanwhile."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from pathlib import Path

from app.local_ray import LOCAL_ENV
from tests.faults import report
from tests.faults.catalogue import ALL
from tests.faults.laboratory import Laboratory
from tests.faults.scenario import Row, Scenario, run

FOLDER = Path(".bench") / "faults"
LEDGERS = FOLDER / "ledgers"
PAGE = Path("docs") / "faults.md"


def main() -> int:
    options = _options()
    chosen = [scenario for scenario in ALL if any(word in scenario.name for word in options.words)]
    if options.list:
        print("\n".join(f"{scenario.name}: {scenario.fault}" for scenario in chosen))
        return 0
    if options.record:
        try:
            report.record(report.read(FOLDER), PAGE, _circumstances())
        except ValueError as error:
            print(f"nothing recorded: {error}", file=sys.stderr)
            return 1
        return 0
    os.environ.update(LOCAL_ENV)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    rows = try_all(chosen)
    print("\n" + report.table(rows))
    print(f"{FOLDER / 'faults.md'} says what became of each promise, {LEDGERS} of each request")
    return 0 if len(rows) == len(chosen) and all(row.kept for row in rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument(
        "-k",
        dest="words",
        action="append",
        metavar="WORD",
        help="only scenarios with this word in their names, or one of several; other rows stay from earlier runs",
    )
    parser.add_argument("--list", action="store_true", help="name the scenarios and do nothing")
    parser.add_argument("--record", action="store_true", help=f"put the table of the last run into {PAGE}")
    options = parser.parse_args()
    options.words = options.words or [""]
    return options


def try_all(chosen: list[Scenario]) -> list[Row]:
    rows = []
    with Laboratory() as lab:
        for scenario in chosen:
            row = run(scenario, lab, LEDGERS)
            rows.append(row)
            report.write(report.merge(report.read(FOLDER), row, [each.name for each in ALL]), FOLDER)
            print(report.line(row), f"({row.took_s:.0f} s)", *row.findings, sep="\n    ", flush=True)
    return rows


def _circumstances() -> str:
    """On which kind of machine; each row has its own date and commit."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return f"{machine}, `make faults`; a commit with a `+` had changes that were not committed:"


if __name__ == "__main__":
    sys.exit(main())
