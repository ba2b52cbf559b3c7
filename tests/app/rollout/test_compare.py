from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app.backends.fake import fake_prediction
from app.rollout.compare import compare
from serve_app.contract import Options, Prediction


def predicted(probs: list[list[float]], mean: list[float], sd: list[float]) -> Prediction:
    return replace(
        fake_prediction(len(probs)),
        classification_probs=np.array(probs, np.float32),
        regression_pred=np.array(mean, np.float32),
        regression_uncertainty=np.array(sd, np.float32),
    )


def test_equal_predictions_are_no_distance_apart() -> None:
    one = predicted([[0.2, 0.3, 0.5], [1, 0, 0]], [0.5, -2], [1, 0])
    comparison = compare(one, one)
    assert comparison.distance.tolist() == [0, 0]
    assert comparison.stable_class.tolist() == comparison.canary_class.tolist() == [2, 0]
    assert comparison.regression_gap is not None
    assert comparison.regression_gap.tolist() == [0, 0]
    assert not comparison.outside_interval.any()


def test_distance_is_half_of_the_absolute_differences() -> None:
    stable = predicted([[1, 0, 0], [0.5, 0.25, 0.25]], [0, 0], [1, 1])
    canary = predicted([[0, 0, 1], [0.25, 0.5, 0.25]], [0, 0], [1, 1])
    assert compare(stable, canary).distance.tolist() == [1.0, 0.25]


def test_the_gap_is_canary_less_stable_in_combined_deviations() -> None:
    flat = [[0.2, 0.6, 0.2]] * 3
    stable = predicted(flat, [0, 0, 1], [3, 3, 3])
    canary = predicted(flat, [10, -8, 9.2], [4, 4, 4])
    comparison = compare(stable, canary)
    assert comparison.regression_gap == pytest.approx([2.0, -1.6, 1.64], abs=1e-6)
    assert comparison.outside_interval.tolist() == [True, False, False]  # the bound is 1.645


def test_arms_that_are_sure_of_different_returns_are_outside() -> None:
    stable = predicted([[1, 0, 0]], [0.1], [0])
    canary = predicted([[1, 0, 0]], [0.2], [0])
    assert compare(stable, canary).outside_interval.tolist() == [True]


def test_without_an_uncertainty_there_is_no_gap() -> None:
    without = fake_prediction(2, Options(return_uncertainty=False))
    comparison = compare(fake_prediction(2), without)
    assert comparison.regression_gap is None
    assert comparison.outside_interval is None


def test_predictions_for_different_numbers_of_windows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different numbers"):
        compare(fake_prediction(2), fake_prediction(3))
