"""Engines: a loaded model that answers windows, one call at a time, on the thread that calls. No Ray, HTTP or queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from serve_app.contract import CLASSES, MEMBERS, N_FEATURES, N_STEPS, FloatArray, Options, Prediction
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import Artefact, ArtefactRejected

logger = logging.getLogger(__name__)

WARM_UP_PASSES = 3
WARM_UP_BATCHES = (1, 32)  # the two sizes that latency and throughput live at


class Engine(Protocol):
    """A model in memory.

    Attributes:
        name: Its name in `ENGINES`.
        device: Where it really runs, which may not be where it was wanted.
        model_name: Name in the registry.
        model_version: Version in the registry, never an alias.
        n_params: Trained values of the model.
    """

    name: str
    device: str
    model_name: str
    model_version: str
    n_params: int

    def warm_up(self) -> None:
        """Run the first, slow passes now, so that no caller waits for them."""

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        """Answer windows float32[B,F,T]. The answer is not checked: `Prediction.check` is the caller's to call.

        Raises:
            Exception: Whatever the forward pass raises; memory errors among it.
        """


class TorchEngine:
    """The model in eager PyTorch, float32.

    Args:
        artefact: A version from the registry.
        device: `cpu`, `cuda` or `cuda:N`; without CUDA in this process it is `cpu`, with a warning.
        threads: Threads of one forward pass.

    Raises:
        ValueError: No artefact.
        ArtefactRejected: Config and weights do not belong to this model code or to one another.
    """

    name = "torch"

    def __init__(self, artefact: Artefact | None, *, device: str, threads: int) -> None:
        if artefact is None:
            raise ValueError("the torch engine needs an artefact from the registry")
        self._threads = threads
        self.device = _available(device)
        self.model_name = artefact.name
        self.model_version = artefact.version
        self._model = _load_model(artefact).to(self.device).fold()
        self.n_params = self._model.n_params

    def warm_up(self) -> None:
        random = np.random.default_rng(0)
        everything = Options(return_uncertainty=True, use_ensemble=True, return_features=True)
        for size in WARM_UP_BATCHES:
            windows = random.standard_normal((size, N_FEATURES, N_STEPS), dtype=np.float32)
            for _ in range(WARM_UP_PASSES):
                self.predict(windows, everything)

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        started = time.perf_counter()
        if torch.get_num_threads() != self._threads:  # OpenMP keeps this figure per calling thread
            torch.set_num_threads(self._threads)
        writable = windows if windows.flags.writeable else windows.copy()  # torch takes no read-only memory
        with torch.inference_mode():
            x = torch.from_numpy(writable).to(self.device)
            answer = self._model.predict(x, use_ensemble=options.use_ensemble, return_features=options.return_features)
            arrays: dict[str, Any] = {name: _to_numpy(tensor) for name, tensor in answer.items()}
        if not options.return_uncertainty:
            arrays.update(aleatoric=None, epistemic=None, predictive_entropy=None)
        return Prediction(
            **arrays,
            regression_uncertainty=_hypotenuse(arrays["aleatoric"], arrays["epistemic"]),
            model_name=self.model_name,
            model_version=self.model_version,
            model_time_ms=(time.perf_counter() - started) * 1000,
        )


class NoopEngine:
    """Answers a constant at once: for measuring what everything around a model costs, never for a caller."""

    name = "noop"
    device = "cpu"
    model_name = "noop"
    n_params = 0

    def __init__(self, artefact: Artefact | None, *, device: str, threads: int) -> None:
        self.model_version = artefact.version if artefact else "0"

    def warm_up(self) -> None:
        pass

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        size = len(windows)
        deviation = np.full(size, 0.5, np.float32) if options.return_uncertainty else None
        return Prediction(
            classification_probs=np.full((size, len(CLASSES)), 1 / len(CLASSES), np.float32),
            regression_pred=np.zeros(size, np.float32),
            regression_uncertainty=_hypotenuse(deviation, deviation),
            aleatoric=deviation,
            epistemic=deviation,
            predictive_entropy=None if deviation is None else np.full(size, np.log(len(CLASSES)), np.float32),
            ensemble_weights=np.full((size, len(MEMBERS)), 1 / len(MEMBERS), np.float32)
            if options.use_ensemble
            else None,
            features=np.zeros((size, 1), np.float32) if options.return_features else None,
            model_name=self.model_name,
            model_version=self.model_version,
            model_time_ms=0.0,
        )


class _EngineClass(Protocol):
    def __call__(self, artefact: Artefact | None, *, device: str, threads: int) -> Engine: ...


ENGINES: Mapping[str, _EngineClass] = {TorchEngine.name: TorchEngine, NoopEngine.name: NoopEngine}

# Engines that answer without a model, so that overhead can be measured without a registry.
WITHOUT_ARTEFACT = frozenset({NoopEngine.name})


def load_engine(
    artefact: Artefact | None, *, engine: str = TorchEngine.name, device: str = "cpu", threads: int = 1
) -> Engine:
    """Make an engine by name; call its `warm_up` before the first caller comes.

    Args:
        artefact: What `Registry.load` returned; None only for engines in `WITHOUT_ARTEFACT`.
        engine: A name in `ENGINES`.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of one forward pass.

    Raises:
        ValueError: No such engine, or no artefact for one that needs it.
        ArtefactRejected: The artefact is no model that this code can run.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r:.40}: known are {', '.join(sorted(ENGINES))}")
    return ENGINES[engine](artefact, device=device, threads=threads)


def memory_report(device: str) -> dict[str, float]:
    """Memory of the device in this process: `allocated_mb`, `reserved_mb`, `utilization_pct`; zeros without CUDA."""
    allocated = reserved = 0
    if device.startswith("cuda") and torch.cuda.is_available():
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {
        "allocated_mb": allocated / 1024**2,
        "reserved_mb": reserved / 1024**2,
        "utilization_pct": 100.0 * allocated / reserved if reserved else 0.0,
    }


def _available(device: str) -> str:
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("%s is wanted and this process has no CUDA: running on cpu", device)
        return "cpu"
    return device


def _load_model(artefact: Artefact) -> HybridModel:
    try:
        config = ModelConfig.from_dict(artefact.config)
        if (config.n_features, config.n_steps) != (N_FEATURES, N_STEPS):
            raise ValueError(f"it is for windows of {config.n_features} by {config.n_steps}")
        # On the meta device a model has shapes and no memory, whatever sizes the config asks for.
        with torch.device("meta"):
            expected = HybridModel(config).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ArtefactRejected(f"config.json describes no model that this code can build: {error}") from error
    weights = _parse_weights(artefact.weights)
    _require_same_tensors(expected, weights)
    model = HybridModel(config)
    model.load_state_dict(weights)
    return model


def _parse_weights(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtefactRejected("model.safetensors is no safetensors file") from error


def _require_same_tensors(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    if differing := sorted(set(expected) ^ set(weights)):
        raise ArtefactRejected(f"weights and config differ in tensors: {', '.join(differing)[:200]}")
    for name, tensor in expected.items():
        if not weights[name].isfinite().all():
            raise ArtefactRejected(f"{name} holds values that are not finite")
        if (weights[name].shape, weights[name].dtype) != (tensor.shape, tensor.dtype):
            raise ArtefactRejected(
                f"{name} is {weights[name].dtype} {tuple(weights[name].shape)} "
                f"and the config asks for {tensor.dtype} {tuple(tensor.shape)}"
            )


def _to_numpy(tensor: Tensor | None) -> FloatArray | None:
    if tensor is None:
        return None
    array: FloatArray = tensor.to("cpu", torch.float32).numpy()
    return array


def _hypotenuse(a: FloatArray | None, b: FloatArray | None) -> Any:
    return None if a is None or b is None else np.hypot(a, b)
