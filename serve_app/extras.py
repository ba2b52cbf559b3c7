"""Optional libraries of the engines: which extra brings them, and whether they are here. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple


class Extra(NamedTuple):
    """An extra of this package, and the libraries that it brings."""

    name: str
    libraries: tuple[str, ...]


_ONNX_RUNTIME = Extra("onnxruntime", ("onnxruntime", "onnx"))
_OPENVINO = Extra("openvino", ("openvino",))

ENGINE_EXTRAS: Mapping[str, Extra] = {
    "onnxruntime": _ONNX_RUNTIME,
    "openvino": _OPENVINO,
    "openvino-bf16": _OPENVINO,
}


def why_missing(engine: str) -> str | None:
    """One line that names the extra which an engine lacks here; None where it lacks nothing."""
    extra = ENGINE_EXTRAS.get(engine)
    if extra is None or all(find_spec(library) is not None for library in extra.libraries):
        return None
    return f"the engine {engine} is not installed: pip install 'sluice[{extra.name}]'"
