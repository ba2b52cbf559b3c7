"""What an engine is, and what all engines that run the model's graph have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serve_app.contract import N_FEATURES, N_STEPS, FloatArray, Options, Prediction
from serve_app.model import HybridModel, Mixture
from serve_app.registry import Artefact

# Libraries prepare kernels and plans at the first passes of each batch size, some 4 ms each. Not all sizes, because a
# replica that changes its model answers nobody meanwhile.
WARM_UP_BATCHES = (1, 2, 4, 8, 16, 32)
WARM_UP_BATCHES_CUDA = tuple(range(1, 33))  # cudnn.benchmark looks for kernels at the first batch of every size
WARM_UP_PASSES = 2  # the first prepares, the second still comes out of a trace that is being optimised
EVERYTHING = Options(return_uncertainty=True, use_ensemble=True, return_features=True)


class Engine(Protocol):
    """A model in memory, that answers one call at a time on the thread that calls.

    Attributes:
        name: Its name in `ENGINES`.
        device: Where it really runs, which may not be where it was wanted.
        model_name: Name in the registry.
        model_version: Version in the registry, never an alias.
        n_params: Trained values of the model.
        remark: How it came to be this engine, in one line; empty where a setting named it.
    """

    name: str
    device: str
    model_name: str
    model_version: str
    n_params: int
    remark: str

    def warm_up(self) -> None:
        """Run the first, slow passes now, so that no caller waits for them."""

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        """Answer windows float32[B,F,T]. The answer is not checked: `Prediction.check` is the caller's to call.

        Raises:
            Exception: Whatever the forward pass raises; memory errors among it.
        """


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is to run.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of one forward pass.
        gpu_share: Share of the GPU that is this process's own; it bounds the memory taken there.
        exact: Answers whose bits do not depend on batch mates.
        fault_file: What the engine `faulty` reads; the others know nothing of it.
    """

    device: str = "cpu"
    threads: int = 1
    gpu_share: float = 1.0
    exact: bool = False
    fault_file: Path | None = None


class GraphEngine(ABC):
    """An engine whose model is one graph: windows and the members' weights in, all fields of `Mixture` out.

    The options cost nothing in the graph. Which members answer is the second input; uncertainty and features are by
    then computed anyway, so what was not asked for is left out of the answer.

    Args:
        artefact: Where the model came from.
        model: The model itself, folded, on the cpu.
        device: Where the graph runs.
    """

    name: str
    remark = ""

    def __init__(self, artefact: Artefact, model: HybridModel, device: str) -> None:
        self.device = device
        self.model_name = artefact.name
        self.model_version = artefact.version
        self.n_params = model.n_params
        self._weights = {
            choice: model.member_weights(use_ensemble=choice).detach().numpy().copy() for choice in (True, False)
        }

    def warm_up(self) -> None:
        random = np.random.default_rng(0)
        for size in WARM_UP_BATCHES if self.device == "cpu" else WARM_UP_BATCHES_CUDA:
            windows = random.standard_normal((size, N_FEATURES, N_STEPS), dtype=np.float32)
            for _ in range(WARM_UP_PASSES):
                self.predict(windows, EVERYTHING)

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        started = time.perf_counter()
        weights = self._weights[options.use_ensemble]
        arrays: dict[str, Any] = dict(zip(Mixture._fields, self._run(windows, weights), strict=True))
        arrays["regression_uncertainty"] = np.hypot(arrays["aleatoric"], arrays["epistemic"])
        if not options.return_uncertainty:
            arrays.update(dict.fromkeys(_UNCERTAINTIES))
        if not options.return_features:
            arrays["features"] = None
        return Prediction(
            **arrays,
            ensemble_weights=np.tile(weights, (len(windows), 1)) if options.use_ensemble else None,
            model_name=self.model_name,
            model_version=self.model_version,
            model_time_ms=(time.perf_counter() - started) * 1000,
        )

    @abstractmethod
    def _run(self, windows: FloatArray, weights: FloatArray) -> Sequence[npt.NDArray[np.float32]]:
        """The fields of `Mixture`, each a C-contiguous float32 array that nothing else will write to.

        Args:
            windows: float32[B,F,T], maybe read-only.
            weights: float32[M], of the members.
        """


_UNCERTAINTIES = ("regression_uncertainty", "aleatoric", "epistemic", "predictive_entropy")
