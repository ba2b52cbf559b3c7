"""The fault table: as JSON for machines, as markdown for people, and as the measured copy in the documents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.scenario import Row

HEAD = (
    "| fault | requests | answered | lost | late | p50, p99 ms | back after | promises | measured |\n"
    "|---|--:|---|--:|--:|--:|--:|---|---|\n"
)
PROMISES_HEAD = "| fault | what is done | promised |\n|---|---|---|\n"
BEGIN, END = "<!-- measured: make faults ARGS=--record -->\n", "<!-- end -->\n"


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `faults.json` and `faults.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    (folder / "faults.md").write_text(table(rows) + details(rows))


def read(folder: Path) -> list[Row]:
    """The rows of an earlier run; none where there was none."""
    file = folder / "faults.json"
    return [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []


def merge(old: Sequence[Row], new: Row, order: Sequence[str]) -> list[Row]:
    """The rows with one replaced or added, in the order of the names."""
    rows = {row.name: row for row in (*old, new)}
    return [rows[name] for name in order if name in rows]


def record(rows: Sequence[Row], page: Path, circumstances: str) -> None:
    """Put the table into a page, between its two marks.

    Raises:
        ValueError: Of some row nobody knows which commit it was measured of.
    """
    if unknown := [row.name for row in rows if not row.commit]:
        raise ValueError("measured of an unknown commit: " + ", ".join(unknown))
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    promises = "".join(f"| `{row.name}` | {row.fault} | {row.promise} |\n" for row in rows)
    measured = f"{circumstances}\n\n{table(rows)}\n{PROMISES_HEAD}{promises}"
    page.write_text(before + BEGIN + measured + END + after)


def table(rows: Sequence[Row]) -> str:
    return HEAD + "".join(line(row) + "\n" for row in rows)


def line(row: Row) -> str:
    answers = ", ".join(f"{count} {kind}" for kind, count in row.answers.items())
    recovery = "" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
    verdict = "kept" if row.kept else "**broken**"
    latency = "" if math.isnan(row.p50_ms) else f"{row.p50_ms:.0f}, {row.p99_ms:.0f}"
    cells = (
        f"`{row.name}`",
        row.sent,
        answers,
        row.lost,
        row.late,
        latency,
        recovery,
        verdict,
        f"{row.date} {row.commit}".strip(),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def details(rows: Sequence[Row]) -> str:
    """What was done and what became of each promise."""
    parts = [f"\n`{row.name}`: {row.fault}\n" + "".join(f"- {each}\n" for each in row.findings) for row in rows]
    return "".join(parts)
