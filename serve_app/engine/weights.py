"""From an artefact's config and bytes to the model itself, once every tensor is known to fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from serve_app.contract import N_FEATURES, N_STEPS
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import ArtefactRejected


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
