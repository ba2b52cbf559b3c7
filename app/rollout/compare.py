"""Two predictions for the same windows, side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serve_app.contract import Prediction

Floats = npt.NDArray[np.float64]

# Half width of the central 90 % interval of a normal distribution, in standard deviations.
Z_90 = 1.6448536269514722


class Comparison(NamedTuple):
    """How far two predictions are apart, window by window.

    Attributes:
        stable_class: int64[B], the class that the stable arm finds likeliest, the first of several.
        canary_class: int64[B], the canary's.
        distance: float64[B], total variation distance of the class distributions: half the sum of their absolute
            differences, 0 for equal ones and 1 for those that share nothing.
        regression_gap: float64[B], canary's expected return less stable's, in units of their combined standard
            deviation; None unless both tell theirs.
        outside_interval: bool[B], whether the gap is beyond what nine of ten would keep within, were the two
            predictions independent and normal with these deviations; None where there is no gap.
    """

    stable_class: npt.NDArray[np.int64]
    canary_class: npt.NDArray[np.int64]
    distance: Floats
    regression_gap: Floats | None
    outside_interval: npt.NDArray[np.bool_] | None


def compare(stable: Prediction, canary: Prediction) -> Comparison:
    """Compare the predictions of two arms for the same windows in the same order.

    Raises:
        ValueError: They are for different numbers of windows.
    """
    if len(stable) != len(canary):
        raise ValueError("the predictions are for different numbers of windows")
    # In float64: a float32 sum of differences could come out a little above 1.
    one, other = (side.classification_probs.astype(np.float64) for side in (stable, canary))
    gap = _regression_gap(stable, canary)
    return Comparison(
        stable_class=one.argmax(axis=1),
        canary_class=other.argmax(axis=1),
        distance=0.5 * np.abs(one - other).sum(axis=1),
        regression_gap=gap,
        outside_interval=None if gap is None else np.abs(gap) > Z_90,
    )


def _regression_gap(stable: Prediction, canary: Prediction) -> Floats | None:
    if stable.regression_uncertainty is None or canary.regression_uncertainty is None:
        return None
    difference = canary.regression_pred.astype(np.float64) - stable.regression_pred
    combined = np.hypot(stable.regression_uncertainty, canary.regression_uncertainty, dtype=np.float64)
    # Two arms that are sure of the same are no distance apart; sure of different things, they are infinitely far.
    with np.errstate(divide="ignore"):
        gap: Floats = np.divide(difference, combined, out=np.zeros_like(difference), where=difference != 0)
    return gap
