"""A run's results as markdown, with its plots beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    Key,
    Results,
    Spread,
    by_round,
    cpu_ms,
    keys,
    n_failed,
    over_rounds,
    p50_ms,
    p99_ms,
    rps,
    share_of_bare,
    spread,
)
from benchmarks.goals import Verdict, judge
from benchmarks.pictures import draw_all
from benchmarks.rounds import NOOP, SHIPPED, SMALL

RESULTS_FILE, REPORT_FILE = "results.json", "RESULTS.md"
_HEADINGS = {
    NOOP: "A model that answers at once",
    SMALL: "A model of about 1 ms per window",
    SHIPPED: "The shipped model",
}


def write_report(results: Results, folder: Path) -> str:
    """Write `results.json`, `RESULTS.md` and the plots into a folder; the markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(results)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    text = render(results, sorted(pictures))
    (folder / REPORT_FILE).write_text(text)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1))
    return text


def render(results: Results, pictures: Sequence[str] = ()) -> str:
    """The whole report as markdown."""
    parts = [
        "# Benchmark results",
        _describe(results),
        "## Goals",
        _goal_table(judge(results)),
        *(_model_part(results, model) for model in (NOOP, SMALL, SHIPPED)),
        _one_connection_part(results),
        _sweep_part(results),
        _lane_part(results),
        _remarks_part(results),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _describe(results: Results) -> str:
    machine, plan = results["machine"], results["plan"]
    versions = ", ".join(f"{name} {value}" for name, value in {**machine["versions"], **machine["peers"]}.items())
    engines = ", ".join(f"{model}: {engine}" for model, engine in results["engines"].items())
    return (
        f"{machine['started_at']}, commit {machine['commit']}. {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB, load before {machine['load_average_before'][0]}. Python {machine['python']}, "
        f"{versions}. Engines: {engines}. {plan['rounds']} interleaved rounds, "
        f"{results.get('seconds_in_all', 0) / 60:.1f} minutes in all{_foreign(results)}. Figures are medians "
        "over the rounds, with the lowest and the highest in brackets; ratios are taken inside each round. "
        "`python -m benchmarks report` makes this page again from `results.json`."
    )


def _foreign(results: Results) -> str:
    """How much of the machine others took meanwhile: the first thing to look at when figures surprise."""
    taken = spread(row.get("foreign_cores") for row in results["rows"])
    return f"; others took {taken.median:.2f} cores (at most {taken.high:.2f})" if taken else ""


def _goal_table(verdicts: Iterable[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        sign = "≥" if verdict.at_least else "≤"
        failed = f"{verdict.failed} requests failed" if verdict.failed else ""
        notes = "; ".join(note for note in (verdict.note, failed) if note)
        measured = _spread(verdict.measured, verdict.unit, digits=2)
        rows.append([verdict.text, f"{sign} {verdict.limit:g}{verdict.unit}", measured, verdict.word, notes])
    return _table(["32 connections unless said", "goal", "measured", "", ""], rows)


def _model_part(results: Results, model: str) -> str:
    found = [key for key in keys(results) if key.model == model and key.loop == "closed"]
    if not found:
        return ""
    rows = [_system_row(results, key) for key in sorted(found, key=lambda key: (key.windows, key.connections))]
    head = ["system", "lane", "windows", "connections", "requests/s", "p50 ms", "p99 ms", "CPU-ms/request"]
    head += ["open loop: p50", "p99", "max ms", "failed"]
    if model != NOOP:
        head.insert(5, "share of bare engine")
    return f"## {_HEADINGS[model]}\n\n{_bare_line(results, model)}{_table(head, rows)}"


def _system_row(results: Results, key: Key) -> list[str]:
    opened = Key(key.system, key.model, key.lane, key.connections, key.windows, "open")
    failed = sum(n_failed(row) for loop in (key, opened) for row in by_round(results, loop).values())
    cells = [
        results["titles"].get(key.system, key.system),
        key.lane,
        str(key.windows),
        str(key.connections),
        _spread(over_rounds(results, key, rps), digits=0),
        _median(over_rounds(results, key, p50_ms)),
        _median(over_rounds(results, key, p99_ms)),
        _median(over_rounds(results, key, cpu_ms)),
        _median(over_rounds(results, opened, p50_ms)),
        _median(over_rounds(results, opened, p99_ms)),
        _median(over_rounds(results, opened, lambda row: row["latency_ms"]["max"])),
        f"{failed:.0f}",
    ]
    if key.model != NOOP:
        cells.insert(5, _median(share_of_bare(results, key)))
    return cells


def _bare_line(results: Results, model: str) -> str:
    batches = sorted({row["batch"] for row in results["bare"] if row["model"] == model})
    told = []
    for batch in batches:
        rows = [row for row in results["bare"] if (row["model"], row["batch"]) == (model, batch)]
        windows = sorted(row["windows_per_s"] for row in rows)[len(rows) // 2]
        told.append(f"{windows:.0f} windows/s at batch {batch}")
    return f"The bare engine on one core: {', '.join(told)}.\n\n" if told else ""


def _one_connection_part(results: Results) -> str:
    found = results.get("one_connection")
    if not found:
        return ""
    rows = [
        [str(number + 1), *(f"{value:.2f}" for value in row.values())] for number, row in enumerate(found["rounds"])
    ]
    head = ["round", *(name.removesuffix("_ms").replace("_", " ") + ", ms" for name in found["rounds"][0])]
    in_turn, hot = (
        f"{added['median']:.2f} ms ({added['min']:.2f} to {added['max']:.2f})"
        for added in (found["added_over_engine_in_turn_ms"], found["added_over_engine_hot_ms"])
    )
    line = f"Added over the engine in turn: {in_turn}; over the engine in a hot loop, its best case: {hot}."
    return f"## One connection, shipped model\n\n{_table(head, rows)}\n\n{line}"


def _sweep_part(results: Results) -> str:
    rows = [row for row in results.get("sweep", ()) if "cpu_ms" in row]
    if not rows:
        return ""
    roles = sorted({role for row in rows for role in row["cpu_ms"]})
    cells = [
        [
            str(row["connections"]),
            f"{row['answered_rps']:.0f}",
            *(f"{row['cpu_ms'].get(role, 0):.3f}" for role in roles),
        ]
        for row in rows
    ]
    head = ["connections", "requests/s", *(f"{role}, CPU-ms/request" for role in roles)]
    return f"## Cost per request of Sluice, noop, binary\n\n{_table(head, cells)}"


def _lane_part(results: Results) -> str:
    rows: list[dict[str, Any]] = results.get("model_lane", [])
    if not rows:
        return ""
    columns = [name for name in rows[0] if name != "label"]
    cells = [[_plain(row.get(name, "")) for name in columns] for row in rows]
    return f"## Models in process ({rows[0]['label']})\n\n{_table(columns, cells)}\n\n{results['model_lane_note']}"


def _remarks_part(results: Results) -> str:
    remarks = dict.fromkeys(
        f"- {row['system']} on {row['model']}{' ' + row['lane'] if 'lane' in row else ''}: {row['error']}"
        for row in results["rows"]
        if "error" in row
    )
    legacy = sum(row.get("facts", {}).get("windows_by_arm", {}).get("legacy", 0) for row in results["rows"])
    if legacy:
        remarks[f"- {legacy:.0f} windows of Sluice's were answered by legacy, not by Ray Serve"] = None
    return "## Remarks\n\n" + "\n".join(remarks) if remarks else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(found: Spread | None, unit: str = "", *, digits: int) -> str:
    if found is None:
        return "-"
    median, low, high = (f"{value:,.{digits}f}" for value in found)
    return f"{median}{unit} [{low}, {high}]"


def _median(found: Spread | None) -> str:
    return "-" if found is None else f"{found.median:.2f}"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
