"""Engines: a loaded model that answers windows, one call at a time, on the thread that calls. No Ray, HTTP or queue.

    torch           PyTorch; the default, and all that a plain installation has
    onnxruntime     ONNX Runtime, extra `onnxruntime`
    openvino        OpenVINO, extra `openvino`; openvino-bf16 with less precision
    auto            the quickest of torch, onnxruntime and openvino where it is loaded
    noop, sleep     no model: for measuring, and for tests of overload
    faulty          no model either, and fails as a file tells it: for tests of faults

All but the last three answer the same within 1e-5 (bf16: 1e-2, features 2e-2). Each optional library has one home here,
which is imported when its engine is first loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from serve_app.engine.base import Engine, Setup
from serve_app.engine.exact import ExactEngine
from serve_app.engine.faulty import FaultyEngine
from serve_app.engine.pytorch import TorchEngine
from serve_app.engine.quickest import load_quickest
from serve_app.engine.stubs import NoopEngine, SleepEngine
from serve_app.extras import ENGINE_EXTRAS, why_missing
from serve_app.registry import Artefact

__all__ = ["ENGINES", "WITHOUT_ARTEFACT", "Engine", "EngineNotInstalled", "installed_engines", "load_engine"]


class EngineNotInstalled(ValueError):
    """The engine's library is not there; the message names the extra that brings it."""


def _load_onnx_runtime(artefact: Artefact, setup: Setup) -> Engine:
    from serve_app.engine.onnx_runtime import OnnxRuntimeEngine  # noqa: PLC0415

    return OnnxRuntimeEngine(artefact, setup)


def _load_openvino(artefact: Artefact, setup: Setup) -> Engine:
    from serve_app.engine.open_vino import OpenVinoEngine  # noqa: PLC0415

    return OpenVinoEngine(artefact, setup)


def _load_openvino_bf16(artefact: Artefact, setup: Setup) -> Engine:
    from serve_app.engine.open_vino import OpenVinoBf16Engine  # noqa: PLC0415

    return OpenVinoBf16Engine(artefact, setup)


def _load_auto(artefact: Artefact, setup: Setup) -> Engine:
    names = installed_engines() if setup.device == "cpu" else (TorchEngine.name,)
    return load_quickest({name: _LOADERS[name] for name in names}, artefact, setup)


_LOADERS: Mapping[str, Callable[[Artefact, Setup], Engine]] = {
    "torch": TorchEngine,
    "onnxruntime": _load_onnx_runtime,
    "openvino": _load_openvino,
    "openvino-bf16": _load_openvino_bf16,
    "auto": _load_auto,
}
AUTO = ("torch", "onnxruntime", "openvino")  # what `auto` chooses from: nothing that costs precision

# Engines that answer without a model, so that overhead can be measured without a registry.
_STUBS: tuple[type[NoopEngine], ...] = (NoopEngine, SleepEngine, FaultyEngine)
WITHOUT_ARTEFACT: Mapping[str, type[NoopEngine]] = {engine.name: engine for engine in _STUBS}

ENGINES: tuple[str, ...] = (*_LOADERS, *WITHOUT_ARTEFACT)


def load_engine(
    artefact: Artefact | None,
    *,
    engine: str = "torch",
    device: str = "cpu",
    threads: int = 1,
    gpu_share: float = 1.0,
    exact: bool = False,
    fault_file: Path | None = None,
) -> Engine:
    """Make an engine by name; call its `warm_up` before the first caller comes.

    Args:
        artefact: What `Registry.load` returned; None only for engines in `WITHOUT_ARTEFACT`.
        engine: A name in `ENGINES`.
        device: `cpu`, `cuda` or `cuda:N`; onnxruntime and openvino know cpu only.
        threads: Threads of one forward pass.
        gpu_share: Share of the GPU that is this process's own; it bounds the memory taken there.
        exact: Answers whose bits do not depend on batch mates; `ExactEngine` says at what price.
        fault_file: What the engine `faulty` is told by.

    Raises:
        ValueError: No such engine, a device or share that it cannot have, or no artefact for one that needs it.
        EngineNotInstalled: Its library is not installed.
        ArtefactRejected: The artefact is no model that this code can run.
    """
    setup = Setup(device, threads, gpu_share, exact, fault_file)
    if engine in WITHOUT_ARTEFACT:
        return WITHOUT_ARTEFACT[engine](artefact, setup)
    if engine not in _LOADERS:
        raise ValueError(f"unknown engine {engine!r:.40}: known are {', '.join(sorted(ENGINES))}")
    if artefact is None:
        raise ValueError(f"the {engine} engine needs an artefact from the registry")
    if reason := why_missing(engine):
        raise EngineNotInstalled(reason)
    if device != "cpu" and engine in ENGINE_EXTRAS:
        raise ValueError(f"the {engine} engine runs on cpu only, not on {device}")
    loaded = _LOADERS[engine](artefact, setup)
    return ExactEngine(loaded) if exact else loaded


def installed_engines() -> tuple[str, ...]:
    """The engines of `AUTO` whose libraries are there."""
    return tuple(name for name in AUTO if why_missing(name) is None)
