"""The engine `onnxruntime`: the model as an ONNX graph in ONNX Runtime; needs the extra `onnxruntime`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime

from serve_app.contract import FloatArray
from serve_app.engine.base import GraphEngine, Setup
from serve_app.engine.graph import Graph, to_onnx
from serve_app.engine.weights import load_model
from serve_app.registry import Artefact


class OnnxRuntimeEngine(GraphEngine):
    """The model in ONNX Runtime on cpu, float32. The graph is made in memory at each load.

    Args:
        artefact: A version from the registry.
        setup: Of it the threads.

    Raises:
        ArtefactRejected: Config and weights do not belong to this model code or to one another.
    """

    name = "onnxruntime"

    def __init__(self, artefact: Artefact, setup: Setup) -> None:
        model = load_model(artefact.config, artefact.weights).fold()
        super().__init__(artefact, model, "cpu")
        graph = Graph(model)
        self._session = open_session(to_onnx(graph, graph.example, graph.inputs, graph.outputs), setup.threads)

    def _run(self, windows: FloatArray, weights: FloatArray) -> Sequence[npt.NDArray[np.float32]]:
        return self._session.run(None, {"windows": windows, "weights": weights})  # type: ignore[no-any-return]


def open_session(onnx: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A graph in ONNX's format, ready to run on the cpu."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait by spinning would take the cores from the gateway and from other replicas.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
