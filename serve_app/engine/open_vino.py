"""The engines `openvino` and `openvino-bf16`: the model in OpenVINO; they need the extra `openvino`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# `import openvino` forks a process that reports it to Google Analytics, unless it cannot find this module.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor

from serve_app.contract import FloatArray
from serve_app.engine.base import GraphEngine, Setup
from serve_app.engine.graph import Graph, trace
from serve_app.engine.weights import load_model
from serve_app.registry import Artefact


class OpenVinoEngine(GraphEngine):
    """The model in OpenVINO on cpu, float32. The graph is made in memory at each load.

    Args:
        artefact: A version from the registry.
        setup: Of it the threads.

    Raises:
        ArtefactRejected: Config and weights do not belong to this model code or to one another.
    """

    name = "openvino"
    precision = "f32"

    def __init__(self, artefact: Artefact, setup: Setup) -> None:
        model = load_model(artefact.config, artefact.weights).fold()
        super().__init__(artefact, model, "cpu")
        graph = Graph(model)
        traced = trace(graph, graph.example)
        self._request = open_request(traced, graph.example, threads=setup.threads, precision=self.precision)

    def _run(self, windows: FloatArray, weights: FloatArray) -> Sequence[npt.NDArray[np.float32]]:
        return list(self._request.infer([windows, weights]).values())


class OpenVinoBf16Engine(OpenVinoEngine):
    """The same in bfloat16 where the cpu has it: quicker in large batches, up to 0.01 off, features 0.02.

    `auto` never takes it.
    """

    name = "openvino-bf16"
    precision = "bf16"


def open_request(
    traced: torch.jit.ScriptModule, example: Sequence[Tensor], *, threads: int, precision: str = "f32"
) -> openvino.InferRequest:
    """A trace, not frozen, ready to run on the cpu; the first axis of the first input is free.

    By OpenVINO's reader of traces: `openvino.convert_model` does the same in ten times the time.
    """
    decoder = TorchScriptPythonDecoder(traced, example_input=tuple(example))  # must outlive the conversion
    reader = FrontEndManager().load_by_framework("pytorch")
    converted = reader.convert(reader.load(decoder))
    converted.reshape({0: [-1, *example[0].shape[1:]]})
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # two replicas on one host would pin themselves to the same core
    }
    return openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
