import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from serve_app.contract import FloatArray, Options
from serve_app.cuda import memory_report
from serve_app.engine import ENGINES, TorchEngine, load_engine
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import Artefact, ArtefactRejected, Manifest

EVERYTHING = Options(return_uncertainty=True, use_ensemble=True, return_features=True)
MANIFEST = Manifest(
    name="cnn_lstm",
    version="3",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    files={},
    feature_names=(),
    features_fingerprint="0" * 64,
    scaler_fingerprint="0" * 64,
    training={"seed": 1, "data_sha256": "0" * 64, "held_out_from": {}},  # type: ignore[arg-type]
)


def random_model() -> HybridModel:
    """Every weight random, so that no output is zero by initialisation."""
    model = HybridModel(ModelConfig())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def artefact_of(model: HybridModel, **changes: Any) -> Artefact:
    weights = safetensors.torch.save({name: t.contiguous() for name, t in model.state_dict().items()})
    artefact = Artefact("cnn_lstm", "3", json.loads(json.dumps(model.config.to_dict())), weights, MANIFEST)
    return dataclasses.replace(artefact, **changes)


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return random_model()


@pytest.fixture(scope="module")
def artefact(model: HybridModel) -> Artefact:
    return artefact_of(model)


@pytest.fixture(scope="module")
def windows() -> FloatArray:
    return np.random.default_rng(1).standard_normal((5, 50, 60), dtype=np.float32)


@pytest.mark.parametrize("name", ENGINES)
def test_every_array_of_a_batch_is_contiguous(artefact: Artefact, windows: FloatArray, name: str) -> None:
    prediction = load_engine(artefact, engine=name).predict(windows, EVERYTHING)
    assert {array for array, value in prediction._arrays() if not value.flags.c_contiguous} == set()


def test_the_engine_answers_what_the_model_answers(model: HybridModel, artefact: Artefact, windows: FloatArray) -> None:
    answer = load_engine(artefact).predict(windows, EVERYTHING)
    with torch.no_grad():
        expected = model.fold().predict(torch.from_numpy(windows), use_ensemble=True, return_features=True)
    for name, tensor in expected.items():
        assert tensor is not None
        np.testing.assert_allclose(getattr(answer, name), tensor.numpy(), atol=1e-6, rtol=1e-5)
    answer.check()
    assert (answer.model_name, answer.model_version) == ("cnn_lstm", "3")
    assert answer.model_time_ms > 0


def test_uncertainty_is_the_root_of_both_parts(artefact: Artefact, windows: FloatArray) -> None:
    answer = load_engine(artefact).predict(windows, EVERYTHING)
    assert answer.aleatoric is not None
    assert answer.epistemic is not None
    assert (answer.epistemic > 0).all()
    np.testing.assert_allclose(
        np.square(answer.regression_uncertainty), np.square(answer.aleatoric) + np.square(answer.epistemic), rtol=1e-5
    )


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_only_what_was_asked_for_is_answered(artefact: Artefact, windows: FloatArray, engine: str) -> None:
    loaded = load_engine(artefact, engine=engine)
    loaded.warm_up()
    bare = loaded.predict(windows, Options(return_uncertainty=False, use_ensemble=False, return_features=False))
    optional = (
        "regression_uncertainty",
        "aleatoric",
        "epistemic",
        "predictive_entropy",
        "ensemble_weights",
        "features",
    )
    assert [getattr(bare, name) for name in optional] == [None] * 6
    full = loaded.predict(windows, EVERYTHING)
    assert all(len(getattr(full, name)) == len(windows) for name in optional)
    for answer in (bare, full):
        answer.check()
        assert answer.regression_pred.dtype == answer.classification_probs.dtype == np.float32


def test_the_fusion_head_alone_answers_otherwise_than_the_ensemble(artefact: Artefact, windows: FloatArray) -> None:
    engine = load_engine(artefact)
    ensemble = engine.predict(windows, Options(use_ensemble=True)).regression_pred
    alone = engine.predict(windows, Options(use_ensemble=False)).regression_pred
    assert np.abs(ensemble - alone).max() > 1e-3


def test_a_row_does_not_depend_on_its_batch_mates(artefact: Artefact, windows: FloatArray) -> None:
    engine = load_engine(artefact)
    together = engine.predict(windows, EVERYTHING)
    for row in range(len(windows)):
        alone = engine.predict(windows[row : row + 1], EVERYTHING)
        np.testing.assert_allclose(alone.regression_pred, together.regression_pred[row : row + 1], atol=1e-6)
        np.testing.assert_allclose(alone.epistemic, together.epistemic[row : row + 1], atol=1e-6)  # type: ignore[index]


def test_windows_in_read_only_memory_are_taken(artefact: Artefact, windows: FloatArray) -> None:
    received = np.frombuffer(windows.tobytes(), np.float32).reshape(windows.shape)
    engine = load_engine(artefact)
    expected = engine.predict(windows, EVERYTHING).regression_pred
    np.testing.assert_array_equal(engine.predict(received, EVERYTHING).regression_pred, expected)


def test_the_thread_setting_holds_on_whatever_thread_predicts(artefact: Artefact, windows: FloatArray) -> None:
    engine = load_engine(artefact, threads=1)

    def predict_after_others() -> int:
        torch.set_num_threads(2)
        engine.predict(windows, EVERYTHING)
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(predict_after_others).result() == 1


def test_without_cuda_the_engine_says_that_it_runs_on_cpu(artefact: Artefact, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert load_engine(artefact, device="cuda").device == "cpu"
    assert "no CUDA" in caplog.text
    assert memory_report("cuda") == {"allocated_mb": 0, "reserved_mb": 0, "utilization_pct": 0}


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
        load_engine(artefact_of(model, weights=safetensors.torch.save(harm(state))))


@pytest.mark.parametrize("weights", [b"", b"\x80\x04pickle", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_bytes_that_are_no_safetensors_are_rejected(model: HybridModel, weights: bytes) -> None:
    with pytest.raises(ArtefactRejected, match="no safetensors file"):
        load_engine(artefact_of(model, weights=weights))


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
        load_engine(artefact_of(model, config={**model.config.to_dict(), **change}))


def test_a_model_for_windows_of_another_length_is_rejected(model: HybridModel) -> None:
    # Its weights fit: nothing in them depends on the number of steps.
    with pytest.raises(ArtefactRejected, match="windows of 50 by 30"):
        load_engine(artefact_of(model, config={**model.config.to_dict(), "n_steps": 30}))


def test_an_unknown_engine_is_named_with_the_known_ones(artefact: Artefact) -> None:
    with pytest.raises(ValueError, match="known are auto, noop, onnxruntime, openvino, openvino-bf16, sleep, torch"):
        load_engine(artefact, engine="magic")
    with pytest.raises(ValueError, match="needs an artefact"):
        load_engine(None, engine=TorchEngine.name)
    assert load_engine(None, engine="noop").model_name == "noop"
