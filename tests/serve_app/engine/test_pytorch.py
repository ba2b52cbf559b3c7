"""The engine torch, and what every engine answers."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.contract import FloatArray, Options
from serve_app.cuda import memory_report
from serve_app.engine import ENGINES, load_engine
from serve_app.engine.base import EVERYTHING, Setup
from serve_app.engine.pytorch import TorchEngine
from serve_app.model import HybridModel
from serve_app.registry import Artefact
from tests.serve_app.engine.made import artefact_of, random_model, real_windows, shipped


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return random_model()


@pytest.fixture(scope="module")
def artefact(model: HybridModel) -> Artefact:
    return artefact_of(model)


@pytest.fixture(scope="module")
def windows() -> FloatArray:
    return np.random.default_rng(1).standard_normal((5, 50, 60), dtype=np.float32)


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


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "auto"])
def test_only_what_was_asked_for_is_answered_in_contiguous_arrays(
    artefact: Artefact, windows: FloatArray, engine: str, tmp_path: Path
) -> None:
    (fault_file := tmp_path / "fault.json").write_text("{}")
    loaded = load_engine(artefact, engine=engine, fault_file=fault_file)
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
        assert {name for name, array in answer._arrays() if not array.flags.c_contiguous} == set()
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


def test_eager_and_traced_agree(windows: FloatArray) -> None:
    answers = [TorchEngine(shipped(), Setup(), traced=traced).predict(windows, EVERYTHING) for traced in (True, False)]
    for (name, traced), (_, eager) in zip(answers[0]._arrays(), answers[1]._arrays(), strict=True):
        np.testing.assert_allclose(traced, eager, atol=1e-6, rtol=1e-5, err_msg=name)


def test_a_pass_fetches_no_memory_from_the_kernel() -> None:
    engine = load_engine(shipped())
    windows = real_windows()

    def faults_of_ten() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(10):
            engine.predict(windows, EVERYTHING)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    assert min(faults_of_ten() for _ in range(5)) < 500  # by default some 5,000 to 10,000
