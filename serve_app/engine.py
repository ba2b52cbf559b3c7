"""Engines: a loaded model that answers windows, one call at a time, on the thread that calls. No Ray, HTTP or queue."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from serve_app import cuda
from serve_app.contract import CLASSES, MEMBERS, N_FEATURES, N_STEPS, FloatArray, Options, Prediction
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import Artefact, ArtefactRejected

WARM_UP_PASSES = 3
WARM_UP_BATCHES = (1, 32)  # the two sizes that latency and throughput live at
WARM_UP_BATCHES_CUDA = tuple(range(1, 33))  # cudnn.benchmark looks for kernels at the first batch of every size


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
        gpu_share: Share of the GPU that is this process's own.

    Raises:
        ValueError: No artefact, or a share out of range.
        ArtefactRejected: Config and weights do not belong to this model code or to one another.
    """

    name = "torch"

    def __init__(self, artefact: Artefact | None, *, device: str, threads: int, gpu_share: float) -> None:
        if artefact is None:
            raise ValueError("the torch engine needs an artefact from the registry")
        self._threads = threads
        self.device = cuda.available(device)
        cuda.prepare(self.device, gpu_share)
        self.model_name = artefact.name
        self.model_version = artefact.version
        self._model = load_model(artefact.config, artefact.weights).to(self.device).fold()
        self.n_params = self._model.n_params

    def warm_up(self) -> None:
        random = np.random.default_rng(0)
        everything = Options(return_uncertainty=True, use_ensemble=True, return_features=True)
        for size in _warm_up_batches(self.device):
            windows = random.standard_normal((size, N_FEATURES, N_STEPS), dtype=np.float32)
            for _ in range(WARM_UP_PASSES):
                self.predict(windows, everything)

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        started = time.perf_counter()
        if torch.get_num_threads() != self._threads:  # OpenMP keeps this figure per calling thread
            torch.set_num_threads(self._threads)
        writable = windows if windows.flags.writeable else windows.copy()  # torch takes no read-only memory
        with torch.inference_mode():
            x = cuda.to_device(writable, self.device)
            answer = self._model.predict(x, use_ensemble=options.use_ensemble, return_features=options.return_features)
            arrays = cuda.to_host(answer, self.device)
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

    def __init__(self, artefact: Artefact | None, *, device: str, threads: int, gpu_share: float) -> None:
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
    def __call__(self, artefact: Artefact | None, *, device: str, threads: int, gpu_share: float) -> Engine: ...


ENGINES: Mapping[str, _EngineClass] = {TorchEngine.name: TorchEngine, NoopEngine.name: NoopEngine}

# Engines that answer without a model, so that overhead can be measured without a registry.
WITHOUT_ARTEFACT = frozenset({NoopEngine.name})


def load_engine(
    artefact: Artefact | None,
    *,
    engine: str = TorchEngine.name,
    device: str = "cpu",
    threads: int = 1,
    gpu_share: float = 1.0,
) -> Engine:
    """Make an engine by name; call its `warm_up` before the first caller comes.

    Args:
        artefact: What `Registry.load` returned; None only for engines in `WITHOUT_ARTEFACT`.
        engine: A name in `ENGINES`.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of one forward pass.
        gpu_share: Share of the GPU that is this process's own; it bounds the memory taken there.

    Raises:
        ValueError: No such engine, a share out of range, or no artefact for one that needs it.
        ArtefactRejected: The artefact is no model that this code can run.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r:.40}: known are {', '.join(sorted(ENGINES))}")
    return ENGINES[engine](artefact, device=device, threads=threads, gpu_share=gpu_share)


def load_model(values: Mapping[str, Any], weights: bytes) -> HybridModel:
    """The model of a config and a safetensors file, once every tensor is known to fit.

    Args:
        values: What `ModelConfig.from_dict` takes.
        weights: The safetensors file.

    Raises:
        ArtefactRejected: Config and weights do not belong to this model code or to one another.
    """
    expected = expected_tensors(values)
    tensors = _parse_weights(weights)
    require_tensors(expected, tensors)
    model = HybridModel(ModelConfig.from_dict(dict(values)))
    model.load_state_dict(tensors)
    return model


def expected_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a model's tensors, by its config; they hold no memory, whatever sizes it asks for.

    Raises:
        ArtefactRejected: The config describes no model that this code can build.
    """
    try:
        config = ModelConfig.from_dict(dict(values))
        if (config.n_features, config.n_steps) != (N_FEATURES, N_STEPS):
            raise ValueError(f"it is for windows of {config.n_features} by {config.n_steps}")
        with torch.device("meta"):
            return HybridModel(config).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ArtefactRejected(f"config.json describes no model that this code can build: {error}") from error


def require_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not the expected ones by name, shape and dtype, or that are not finite.

    Raises:
        ArtefactRejected: With the first difference.
    """
    if differing := sorted(set(expected) ^ set(tensors)):
        raise ArtefactRejected(f"weights and config differ in tensors: {', '.join(differing)[:200]}")
    for name, tensor in expected.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ArtefactRejected(
                f"{name} is {found.dtype} {tuple(found.shape)} "
                f"and the config asks for {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not found.isfinite().all():
            raise ArtefactRejected(f"{name} holds values that are not finite")


def _parse_weights(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtefactRejected("model.safetensors is no safetensors file") from error


def _warm_up_batches(device: str) -> Sequence[int]:
    return WARM_UP_BATCHES_CUDA if cuda.is_cuda(device) else WARM_UP_BATCHES


def _hypotenuse(a: FloatArray | None, b: FloatArray | None) -> Any:
    return None if a is None or b is None else np.hypot(a, b)
