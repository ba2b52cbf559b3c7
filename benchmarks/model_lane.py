"""The model alone, in this process: stacked LSTMs of the shapes that public STAC-ML model cards give. Unaudited.

    python -m benchmarks.model_lane [--calls 1000] [--json PATH]

Whole windows, batch 1, one thread, random weights. The engines are asked in turn, a block of calls each, so that a
slow moment of the machine meets all of them. The row `null` answers a constant: what timing a call costs by itself.

The cards count parameters as Keras does: one bias per gate, and a dense layer to one output after the last step.
PyTorch's LSTM has a second bias per gate; it is zero here, is not counted and does not change the function.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rounds import turned
from serve_app.contract import FloatArray
from serve_app.engine.graph import frozen, to_onnx, trace

LABEL = "STAC-shaped, unaudited"
FOOTNOTE = (
    "For comparison, a public unaudited CPU figure for 50x100: ONNX Runtime, 4 vCPU, 570 µs p50, 890 µs p99. "
    "Other machine, other settings."
)
CALLS = 300
BLOCK = 20
WARM_UP_CALLS = 20

Answer = Callable[[FloatArray], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """A window and the stack of LSTMs that reads it, with the number of parameters that its card gives."""

    steps: int
    features: int
    layers: int
    units: int
    parameters: int

    @property
    def name(self) -> str:
        return f"{self.steps}x{self.features}, {self.layers}x{self.units} units"


SHAPES = (
    Shape(steps=50, features=100, layers=2, units=100, parameters=160_901),
    Shape(steps=100, features=250, layers=3, units=200, parameters=1_002_601),
)


class StackedLstm(nn.Module):
    """windows[B,T,F] → one number each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.lstm = nn.LSTM(shape.features, shape.units, shape.layers, batch_first=True)
        self.out = nn.Linear(shape.units, 1)
        with torch.no_grad():
            for name, bias in self.lstm.named_parameters():
                if name.startswith("bias_hh"):
                    bias.zero_().requires_grad_(False)

    def forward(self, windows: Tensor) -> Tensor:
        hidden, _ = self.lstm(windows)  # [B,T,units]
        answer: Tensor = self.out(hidden[:, -1])
        return answer

    @property
    def n_params(self) -> int:
        """As Keras counts: the second bias of PyTorch's LSTM, which is fixed at zero, is none."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def build(shape: Shape) -> StackedLstm:
    """The shape's model with random weights.

    Raises:
        ValueError: It has not the parameters that its card gives.
    """
    torch.manual_seed(0)
    model = StackedLstm(shape).eval()
    if model.n_params != shape.parameters:
        raise ValueError(f"{shape.name} has {model.n_params} parameters and its card says {shape.parameters}")
    return model


def run(calls: int = CALLS, shapes: Sequence[Shape] = SHAPES) -> list[dict[str, Any]]:
    """Rows for every shape and every engine that is installed: label, model, engine, and µs per call.

    Args:
        calls: Of each engine.
        shapes: Models to measure.
    """
    torch.set_num_threads(1)
    return [row for shape in shapes for row in _measure(shape, calls)]


def _measure(shape: Shape, calls: int) -> list[dict[str, Any]]:
    window = np.random.default_rng(0).standard_normal((1, shape.steps, shape.features), dtype=np.float32)
    engines = load_engines(build(shape), window)
    return [
        {
            "label": LABEL,
            "model": shape.name,
            "parameters": shape.parameters,
            "engine": name,
            "p50_us": float(np.percentile(times_us, 50)),
            "p99_us": float(np.percentile(times_us, 99)),
            "max_us": float(times_us.max()),
            "calls": len(times_us),
        }
        for name, times_us in time_in_turns(engines, window, calls).items()
    ]


def load_engines(model: StackedLstm, window: FloatArray) -> dict[str, Answer]:
    """Every engine that is installed by name, and the null model; each takes a window and answers it."""
    example = (torch.from_numpy(window),)
    traced = trace(model, example)
    engines: dict[str, Answer] = {
        "null": lambda window: None,
        "torch, eager": _in_torch(model),
        "torch, traced": _in_torch(frozen(traced)),
    }
    if find_spec("onnxruntime") and find_spec("onnx"):
        from serve_app.engine.onnx_runtime import open_session  # noqa: PLC0415

        session = open_session(to_onnx(model, example, ["windows"], ["answer"]), threads=1)
        engines["onnxruntime"] = lambda window: session.run(None, {"windows": window})[0]
    if find_spec("openvino"):
        from serve_app.engine.open_vino import open_request  # noqa: PLC0415

        request = open_request(traced, example, threads=1)
        engines["openvino"] = lambda window: request.infer([window])[0]
    return engines


def _in_torch(module: Callable[[Tensor], Tensor]) -> Answer:
    def answer(window: FloatArray) -> object:
        with torch.inference_mode():
            return module(torch.from_numpy(window)).numpy()

    return answer


def time_in_turns(
    engines: Mapping[str, Answer],
    window: FloatArray,
    calls: int,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, npt.NDArray[np.float64]]:
    """Microseconds of each call, by engine; blocks of calls in turns, the order rotated from round to round."""
    for answer in engines.values():
        for _ in range(WARM_UP_CALLS):
            answer(window)
    names = list(engines)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(max(1, calls // BLOCK)):
        for name in turned(names, number):
            for _ in range(BLOCK):
                started = clock()
                engines[name](window)
                times[name].append((clock() - started) / 1000)
    return {name: np.array(of_engine) for name, of_engine in times.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    found = Table(title=f"Models in process ({LABEL}), µs per window", caption=FOOTNOTE)
    for name in ("model", "parameters", "engine"):
        found.add_column(name)
    for name in ("p50", "p99", "max"):
        found.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row[name]:,.1f}" for name in ("p50_us", "p99_us", "max_us"))
        found.add_row(row["model"], f"{row['parameters']:,}", row["engine"], *figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="of each engine")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    rows = run(arguments.calls)
    Console().print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "footnote": FOOTNOTE}, indent=2) + "\n")


if __name__ == "__main__":
    main()
