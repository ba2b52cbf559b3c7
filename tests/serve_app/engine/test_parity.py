"""Every engine against the model itself, run operation by operation in PyTorch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from serve_app.contract import FloatArray, Options
from serve_app.engine import ENGINES, WITHOUT_ARTEFACT
from serve_app.engine.weights import load_model
from serve_app.model import HybridModel
from tests.serve_app.engine.made import extreme_windows, loaded, real_windows, shipped

WITH_MODEL = tuple(name for name in ENGINES if name not in {*WITHOUT_ARTEFACT, "auto"})  # auto gives one of the others


def tolerance(name: str, output: str) -> float:
    """Largest difference that is allowed; bfloat16 has 8 bits, and features of size 1 to 3 show them most."""
    if name != "openvino-bf16":
        return 1e-5
    return 2e-2 if output == "features" else 1e-2


@lru_cache
def model() -> HybridModel:
    return load_model(shipped().config, shipped().weights).fold()


def expected(windows: FloatArray, use_ensemble: bool) -> dict[str, FloatArray]:
    with torch.inference_mode():
        answer = model().predict(torch.from_numpy(windows.copy()), use_ensemble=use_ensemble, return_features=True)
    arrays = {name: tensor.numpy() for name, tensor in answer.items() if tensor is not None}
    return {**arrays, "regression_uncertainty": np.hypot(arrays["aleatoric"], arrays["epistemic"])}


@pytest.mark.parametrize("use_ensemble", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("name", WITH_MODEL)
def test_an_engine_answers_as_the_model_does(name: str, size: int, use_ensemble: bool) -> None:
    windows = real_windows()[:size]
    answer = loaded(name).predict(windows, Options(use_ensemble=use_ensemble, return_features=True))
    answer.check()
    for output, array in expected(windows, use_ensemble).items():
        np.testing.assert_allclose(getattr(answer, output), array, atol=tolerance(name, output), rtol=0, err_msg=output)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_it_does_for_windows_that_no_market_shows_too(name: str) -> None:
    windows = extreme_windows()
    answer = loaded(name).predict(windows, Options(return_features=True))
    answer.check()
    for output, array in expected(windows, use_ensemble=True).items():
        np.testing.assert_allclose(getattr(answer, output), array, atol=tolerance(name, output), rtol=0, err_msg=output)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_an_answer_stays_as_it_is_when_the_next_one_comes(name: str) -> None:
    # Libraries like to answer in memory that they use again.
    windows = real_windows()
    first = loaded(name).predict(windows[:4], Options(return_features=True))
    before = [array.copy() for _, array in first._arrays()]
    loaded(name).predict(windows[4:8], Options(return_features=True))
    for (_, array), copy in zip(first._arrays(), before, strict=True):
        np.testing.assert_array_equal(array, copy)
