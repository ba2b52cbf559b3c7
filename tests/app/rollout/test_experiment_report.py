from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import log_loss

from app.rollout.experiment_log import Cell
from app.rollout.experiment_report import Estimate, bootstrap, measure, newcombe, report, wilson


def cell(side: str = "stable", *, seed: int = 0, n: int = 600, callers: int = 30, sharpness: float = 1.0) -> Cell:
    """Windows whose classes are drawn from the very probabilities, which are then sharpened."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet((2, 3, 2), n)
    label = (probs.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    sharpened = probs**sharpness / (probs**sharpness).sum(axis=1, keepdims=True)
    mean, sd = rng.normal(0, 0.2, n), rng.uniform(0.8, 1.2, n)
    return Cell(
        side, f"{side}@1", n, n, rng.integers(0, callers, n), sharpened, mean, sd, label, mean + sd * rng.normal(size=n)
    )


def told(estimate: Estimate | None) -> tuple[float, float, float]:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.value, estimate.low, estimate.high


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 10), (7, 20), (10, 10), (123, 456), (999, 1000)])
def test_wilsons_interval_is_scipys(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [  # Newcombe 1998, table II, method 10
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ],
)
def test_the_difference_has_the_published_intervals(
    one: tuple[int, int], other: tuple[int, int], expected: tuple[float, float]
) -> None:
    assert newcombe(one, other) == pytest.approx(expected, abs=5e-5)


def test_figures_of_classes_are_those_of_other_libraries() -> None:
    of = cell()
    measures = measure(of)
    happened = np.eye(3)[of.label]
    assert told(measures.log_loss)[0] == pytest.approx(log_loss(of.label, of.probs))
    assert told(measures.brier)[0] == pytest.approx(((of.probs - happened) ** 2).sum(axis=1).mean())
    assert told(measures.hit_rate)[0] == (of.probs.argmax(axis=1) == of.label).mean()


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    probs = np.array([[0.9, 0.1, 0.0]] * 4 + [[0.2, 0.6, 0.2]] * 2)
    label = np.array([0, 0, 0, 1, 1, 1])  # three of four at 0.9; two of two at 0.6
    nothing = np.full(6, np.nan)
    measures = measure(Cell("stable", "a", 6, 6, np.arange(6), probs, np.zeros(6), nothing, label, nothing))
    assert told(measures.calibration_error)[0] == pytest.approx((4 * 0.15 + 2 * 0.4) / 6)
    assert [(of.n, of.confidence, of.hit_rate) for of in measures.reliability] == [
        (2, pytest.approx(0.6), 1.0),
        (4, pytest.approx(0.9), 0.75),
    ]
    assert measures.coverage_90 is None
    assert measures.rmse is None


def test_who_is_sure_of_everything_is_in_the_last_bin() -> None:
    nothing = np.full(2, np.nan)
    probs, label = np.array([[1.0, 0, 0], [0, 1.0, 0]]), np.array([0, 2])
    measures = measure(Cell("stable", "a", 2, 2, np.arange(2), probs, np.zeros(2), nothing, label, nothing))
    (only,) = measures.reliability
    assert (only.high, only.n, only.hit_rate) == (1.0, 2, 0.5)
    assert np.isfinite(told(measures.log_loss)[0])


def test_figures_of_returns_are_what_their_names_say() -> None:
    of = cell(n=4000)
    measures = measure(of)
    assert told(measures.rmse)[0] == pytest.approx(np.sqrt(((of.realized - of.mean) ** 2).mean()))
    value, low, high = told(measures.coverage_90)
    assert low < 0.9 < high
    assert value == pytest.approx((np.abs(of.realized - of.mean) / of.sd <= 1.645).mean(), abs=1e-3)


def test_a_model_that_is_too_sure_is_found_to_be() -> None:
    honest, sure = measure(cell(n=4000)), measure(cell(n=4000, sharpness=3.0))
    assert told(sure.calibration_error)[1] > told(honest.calibration_error)[2]
    assert told(sure.log_loss)[1] > told(honest.log_loss)[2]
    assert told(sure.hit_rate) == told(honest.hit_rate)


def test_without_outcomes_there_are_counts_alone() -> None:
    of = cell(n=5)
    unlabelled = of._replace(label=np.full(5, -1), realized=np.full(5, np.nan))
    measures = measure(unlabelled)
    assert (measures.requests, measures.labelled, measures.callers) == (5, 0, 0)
    assert measures.hit_rate is measures.log_loss is measures.rmse is None
    assert report([unlabelled], 0.0).hit_rate_difference is None


def test_callers_are_drawn_whole() -> None:
    """A hundred windows of one caller that are all alike say no more than one of them."""
    rng = np.random.default_rng(3)
    per_caller = rng.normal(size=40)
    values = np.repeat(per_caller, 100)
    columns = np.column_stack([np.ones(4000), values])
    drawn = bootstrap(np.repeat(np.arange(40), 100), columns, lambda sums: sums[:, 1:] / sums[:, :1], draws=2000)
    assert drawn is not None
    assert drawn.std() == pytest.approx(per_caller.std() / np.sqrt(40), rel=0.1)
    assert drawn.std() > 5 * values.std() / np.sqrt(4000)


def test_of_one_caller_nothing_can_be_drawn() -> None:
    measures = measure(cell(callers=1))
    assert measures.log_loss is not None
    assert (measures.log_loss.low, measures.log_loss.high) == (None, None)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Log loss of windows that share their caller's luck: 95 % of the intervals hold the truth, or nearly."""
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        luck = rng.normal(size=60)
        caller = np.repeat(np.arange(60), 8)
        columns = np.column_stack([np.ones(480), luck[caller] + rng.normal(size=480)])
        drawn = bootstrap(caller, columns, lambda sums: sums[:, 1:] / sums[:, :1], draws=200)
        assert drawn is not None
        low, high = np.quantile(drawn, [0.025, 0.975])
        covered += low < 0 < high
    assert covered >= 178  # 190 are expected, less 4 deviations


def test_the_difference_is_canary_less_stable_over_all_that_answered_for_a_side() -> None:
    canary, stable = cell("canary", seed=1), cell("stable", seed=2)
    fallback = cell("canary", seed=3, n=50)._replace(arm="stable@1")
    whole = report([canary, fallback, stable], 0.0)
    hits = [(of.probs.argmax(axis=1) == of.label).tolist() for of in (canary, fallback, stable)]
    value, low, high = told(whole.hit_rate_difference)
    assert value == pytest.approx(np.mean(hits[0] + hits[1]) - np.mean(hits[2]))
    assert low < value < high
    by_caller = told(whole.hit_rate_difference_by_caller)
    assert by_caller[0] == value
    assert by_caller[1] < value < by_caller[2]


def test_few_callers_are_mentioned() -> None:
    assert len(report([cell(callers=5)], 0.0).notes) == len(report([cell(callers=50)], 0.0).notes) + 1


def test_the_report_is_json_and_the_same_each_time() -> None:
    def text() -> str:
        return json.dumps(report([cell("canary"), cell()], 1.0).document(), allow_nan=False)

    document: dict[str, Any] = json.loads(text())
    assert text() == text()
    assert [arm["side"] for arm in document["arms"]] == ["canary", "stable"]
    assert document["arms"][0]["measures"]["hit_rate"]["method"] == "wilson"
    assert document["since"] == 1.0
