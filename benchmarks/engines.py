"""Our engines on the shipped model, in process: time per window by batch size, and what the exact mode costs.

    python -m benchmarks.engines [--rounds 30] [--json PATH]

One thread, real windows. The engines are asked in turns, a block of calls each; figures are medians over all calls.
CPU is the time of this process, all of its threads: on a shared machine it says more than the clock does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from app.bench.inputs import draw_windows
from benchmarks.rounds import turned
from serve_app.contract import FloatArray, Options
from serve_app.engine import Engine, installed_engines, load_engine
from serve_app.engine.base import Setup
from serve_app.engine.exact import ExactEngine
from serve_app.engine.pytorch import TorchEngine
from serve_app.registry import Artefact, Registry

BATCHES = (1, 8, 32)
BLOCK = 10
MODELS = Path(__file__).parents[1] / "models"


def load_all(artefact: Artefact) -> dict[str, Engine]:
    """Every engine that is installed, PyTorch without its trace, and each of them in exact mode; warm."""
    eager: Engine = TorchEngine(artefact, Setup(), traced=False)
    engines = {"torch, eager": eager}
    engines |= {name: load_engine(artefact, engine=name) for name in installed_engines()}
    if "openvino" in engines:
        engines["openvino-bf16"] = load_engine(artefact, engine="openvino-bf16")
    for engine in engines.values():
        engine.warm_up()
    return engines | {f"{name}, exact": ExactEngine(engine) for name, engine in engines.items()}


def run(rounds: int = 30) -> list[dict[str, Any]]:
    """Rows for every engine and batch size: ms per window by the clock and in CPU time, medians.

    Args:
        rounds: Blocks of each engine.
    """
    engines = load_all(Registry(MODELS).load("cnn_lstm"))
    return [row for size in BATCHES for row in _measure(engines, draw_windows(1, size, seed=1)[0], rounds)]


def _measure(engines: Mapping[str, Engine], windows: FloatArray, rounds: int) -> list[dict[str, Any]]:
    names = list(engines)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in turned(names, number):
            times[name] += _block(engines[name], windows)
    return [
        {
            "engine": name,
            "batch": len(windows),
            "ms_per_window": 1000 * median(wall for wall, _ in of_engine) / len(windows),
            "cpu_ms_per_window": 1000 * median(cpu for _, cpu in of_engine) / len(windows),
        }
        for name, of_engine in times.items()
    ]


def _block(engine: Engine, windows: FloatArray) -> list[tuple[float, float]]:
    """Seconds by the clock and of CPU of some calls; one before them finds the caches in another engine's state."""
    engine.predict(windows, Options())
    found = []
    for _ in range(BLOCK):
        started, cpu_started = time.perf_counter(), time.process_time()
        engine.predict(windows, Options())
        found.append((time.perf_counter() - started, time.process_time() - cpu_started))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    sizes = sorted({row["batch"] for row in rows})
    found = Table(title="ms per window (CPU-ms per window), medians")
    found.add_column("engine")
    for size in sizes:
        found.add_column(f"batch {size}", justify="right")
    figures = {(row["engine"], row["batch"]): row for row in rows}
    for name in dict.fromkeys(row["engine"] for row in rows):
        of_engine = [figures[name, size] for size in sizes]
        found.add_row(name, *(f"{row['ms_per_window']:.3f} ({row['cpu_ms_per_window']:.3f})" for row in of_engine))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each engine")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    rows = run(arguments.rounds)
    Console().print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
