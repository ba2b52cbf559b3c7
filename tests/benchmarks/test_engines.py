"""The comparison of engines has a figure for each of them at each batch size."""

from __future__ import annotations

import io

from rich.console import Console

from benchmarks.engines import BATCHES, run, table

ENGINES = ["torch, eager", "torch", "onnxruntime", "openvino", "openvino-bf16"]


def test_every_engine_is_timed_at_every_batch_size_exact_too() -> None:
    rows = run(rounds=1)
    expected = {(name + mode, size) for name in ENGINES for mode in ("", ", exact") for size in BATCHES}
    assert {(row["engine"], row["batch"]) for row in rows} == expected
    assert all(row["ms_per_window"] > 0 and row["cpu_ms_per_window"] > 0 for row in rows)
    shown = io.StringIO()
    Console(file=shown, width=120).print(table(rows))
    assert "openvino-bf16, exact" in shown.getvalue()
