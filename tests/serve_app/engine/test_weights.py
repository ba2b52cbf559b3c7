"""Weights and config that do not fit are refused before a model is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch

from serve_app.engine.weights import load_model
from serve_app.model import HybridModel
from serve_app.registry import Artefact, ArtefactRejected
from tests.serve_app.engine.made import artefact_of, random_model


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return random_model()


def load(artefact: Artefact) -> HybridModel:
    return load_model(artefact.config, artefact.weights)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("highway.bias", "highway.bais"): tensor for name, tensor in state.items()}


def reshaped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "highway.bias": state["highway.bias"][:-1].clone()}


def retyped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "highway.bias": state["highway.bias"].double()}


def diverged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "highway.bias": torch.full_like(state["highway.bias"], torch.nan)}


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (renamed, r"highway.bais, highway.bias"),
        (reshaped, r"\(4,\)"),
        (retyped, r"float64"),
        (diverged, r"highway.bias holds values that are not finite"),
    ],
)
def test_weights_that_are_not_the_configs_are_rejected(model: HybridModel, harm: Any, reason: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtefactRejected, match=reason):
        load(artefact_of(model, weights=safetensors.torch.save(harm(state))))


@pytest.mark.parametrize("weights", [b"", b"\x80\x04pickle", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_bytes_that_are_no_safetensors_are_rejected(model: HybridModel, weights: bytes) -> None:
    with pytest.raises(ArtefactRejected, match="no safetensors file"):
        load(artefact_of(model, weights=weights))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 2**40},
        {"width": 33},
        {"hidden": 1},
        {"width": "x"},
        {"filter_sizes": [[]]},
        {"width": -4},
        {"attention_heads": 0},
    ],
)
def test_a_config_that_no_weights_can_fit_is_rejected_without_building_it(
    model: HybridModel, change: dict[str, Any]
) -> None:
    with pytest.raises(ArtefactRejected):
        load(artefact_of(model, config={**model.config.to_dict(), **change}))


def test_a_model_for_windows_of_another_length_is_rejected(model: HybridModel) -> None:
    # Its weights fit: nothing in them depends on the number of steps.
    with pytest.raises(ArtefactRejected, match="windows of 50 by 30"):
        load(artefact_of(model, config={**model.config.to_dict(), "n_steps": 30}))
