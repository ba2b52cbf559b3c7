"""The engine `torch`: PyTorch itself, on cpu or CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from serve_app import cuda
from serve_app.contract import FloatArray
from serve_app.engine.base import GraphEngine, Setup
from serve_app.engine.graph import Graph, frozen, trace
from serve_app.engine.memory import keep_freed_memory
from serve_app.engine.weights import load_model
from serve_app.registry import Artefact


class TorchEngine(GraphEngine):
    """The model in PyTorch, float32: traced and frozen on cpu, eager on CUDA.

    A trace runs without Python between the operations, which at one window is a good part of the time
    (`docs/adr/0004-engines.md`). On CUDA nothing but the plain path was ever tried.

    Args:
        artefact: A version from the registry.
        setup: Without CUDA in this process its device is `cpu`, with a warning.
        traced: Trace on cpu; otherwise eager, for comparison.

    Raises:
        ValueError: A GPU share out of range.
        ArtefactRejected: Config and weights do not belong to this model code or to one another.
    """

    name = "torch"

    def __init__(self, artefact: Artefact, setup: Setup, *, traced: bool = True) -> None:
        device = cuda.available(setup.device)
        cuda.prepare(device, setup.gpu_share, exact=setup.exact)
        keep_freed_memory()
        model = load_model(artefact.config, artefact.weights).fold()
        super().__init__(artefact, model, device)
        self._threads = setup.threads
        graph = Graph(model.to(device))
        self._run_graph = frozen(trace(graph, graph.example)) if traced and not cuda.is_cuda(device) else graph

    def _run(self, windows: FloatArray, weights: FloatArray) -> Sequence[npt.NDArray[np.float32]]:
        if torch.get_num_threads() != self._threads:  # OpenMP keeps this figure per calling thread
            torch.set_num_threads(self._threads)
        writable = windows if windows.flags.writeable else windows.copy()  # torch takes no read-only memory
        with torch.inference_mode():
            answer = self._run_graph(cuda.to_device(writable, self.device), cuda.to_device(weights, self.device))
            return cuda.to_host(answer, self.device)
