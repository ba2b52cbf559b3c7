"""The report is made from a results file alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import render, write_report
from benchmarks.rounds import NOOP, SHIPPED
from tests.benchmarks.results import results, row


def test_a_table_has_medians_over_rounds_and_what_failed() -> None:
    rows = [row(n, "triton", NOOP, "json", rps) for n, rps in enumerate((100.0, 300.0, 200.0))]
    rows.append(row(0, "triton", NOOP, "json", 80, loop="open", failed={"503": 4}))
    text = render(results(*rows))
    assert "| NVIDIA Triton | json | 1 | 32 | 200 [100, 300] | 1.00 | 2.00 | 0.50 | 1.00 | 2.00 | 3.00 | 4 |" in text


def test_what_was_not_measured_and_what_legacy_answered_are_told() -> None:
    silent = {"round": 0, "system": "bentoml", "model": NOOP, "error": "it did not come up"}
    fallen_back = row(0, "sluice", NOOP, "json", 1, facts={"windows_by_arm": {"legacy": 3.0}})
    text = render(results(silent, fallen_back))
    assert "bentoml on noop: it did not come up" in text
    assert "3 windows of Sluice's were answered by legacy" in text


def test_everything_measured_once_has_a_part() -> None:
    one = {"engine_hot_ms": 1.0, "engine_in_turn_ms": 1.5, "served_ms": 3.0}
    in_turn, hot = ({"median": ms, "min": ms, "max": ms} for ms in (1.5, 2.0))
    text = render(
        results(
            row(0, "sluice", SHIPPED, "binary", 900),
            bare=[{"round": 0, "model": SHIPPED, "batch": 32, "windows_per_s": 1000.0}],
            one_connection={
                "rounds": [one],
                "added_over_engine_in_turn_ms": in_turn,
                "added_over_engine_hot_ms": hot,
            },
            sweep=[{"connections": 1, "answered_rps": 10, "cpu_ms": {"gateway": 0.25}}],
            model_lane=[{"label": "unaudited", "model": "a", "p50_us": 570.0}],
            model_lane_note="Another machine took 600 µs.",
        )
    )
    assert "1000 windows/s at batch 32" in text
    assert "| 0.90 |" in text  # of the bare engine
    assert "Added over the engine in turn: 1.50 ms" in text
    assert "hot loop, its best case: 2.00 ms" in text
    assert "| 1 | 10 | 0.250 |" in text
    assert "(unaudited)" in text
    assert "| a | 570 |" in text
    assert "Another machine took 600 µs." in text


def test_report_results_and_plots_are_written_side_by_side(tmp_path: Path) -> None:
    found = results(row(0, "sluice", NOOP, "json", 1), sweep=[{"connections": 1, "cpu_ms": {"gateway": 1.0}}])
    found["sweep"][0]["answered_rps"] = 1.0
    text = write_report(found, tmp_path / "kept")
    written = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    assert json.loads(written["results.json"]) == found
    assert written["RESULTS.md"].decode() == text
    for name in ("throughput.png", "cost-by-connections.png"):
        assert f"]({name})" in text
        assert written[name].startswith(b"\x89PNG")
