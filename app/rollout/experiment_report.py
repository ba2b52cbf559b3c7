"""What an experiment has shown so far: how well each arm's answers met what happened, and how sure that is.

Windows of one caller are no independent draws: it asks about the same symbols at the same times. Where intervals come
from a bootstrap, whole callers are drawn, who are also what a rollout assigns to its sides. Wilson's and Newcombe's
take every window as a draw of its own, so they are too narrow where callers differ; the difference between the sides
comes with both. No interval here knows that all callers live through the same market.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from app.rollout.compare import Z_90
from app.rollout.experiment_log import Cell, Floats
from serve_app.contract import CLASSES

N_BINS = 10
DRAWS = 1000

_Z_95 = 1.959963984540054
_SEED = 7  # the same log, the same report
_LEAST_PROBABILITY = 1e-12  # a log loss must stay finite
_DRAWN_AT_ONCE = 1 << 20  # weights of callers, 8 MB

_NOTES = (
    "Windows without an outcome are left out; if what is labelled differs between the sides, so may the figures.",
    "Wilson and Newcombe treat windows as independent; bootstrap intervals draw whole callers.",
    "All callers live through the same market: no interval here covers another one.",
)
_FEW_CALLERS = 20
_FEW_CALLERS_NOTE = f"Fewer than {_FEW_CALLERS} callers on a side: its bootstrap intervals are too narrow."


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its central 95 % interval.

    Attributes:
        value: The figure.
        low, high: The interval; None where there is too little to tell.
        method: `wilson`, `newcombe` or `bootstrap-by-caller`.
        n: Windows that it rests on.
    """

    value: float
    low: float | None
    high: float | None
    method: str
    n: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of like confidence, which is the probability of the class they found likeliest.

    Attributes:
        low, high: Confidences from `low` to below `high`; the last bin holds 1 too.
        n: Windows.
        confidence: Their mean.
        hit_rate: How often they were right.
    """

    low: float
    high: float
    n: int
    confidence: float
    hit_rate: float


@dataclass(frozen=True, slots=True)
class Measures:
    """How well answers met outcomes; None where no outcome of that kind is known.

    Attributes:
        requests, windows: Answered, labelled or not.
        labelled: Windows with an outcome of either kind.
        callers: Who have labelled windows.
        hit_rate: Share of windows whose likeliest class happened.
        log_loss: Mean of -ln of the probability given to what happened, nats.
        brier: Mean squared distance of the class distribution from what happened, summed over classes, 0..2
            (Brier, Monthly Weather Review 78, 1950).
        calibration_error: Expected calibration error: mean gap, weighted by count, between confidence and hit rate in
            bins of equal width (Guo et al., ICML 2017). Noise alone makes it more than 0.
        reliability: The bins that are not empty.
        coverage_90: Share of returns within the nominal central 90 % interval.
        rmse: Root mean squared error of the expected return, in volatilities.
    """

    requests: int
    windows: int
    labelled: int
    callers: int
    hit_rate: Estimate | None
    log_loss: Estimate | None
    brier: Estimate | None
    calibration_error: Estimate | None
    reliability: tuple[Bin, ...]
    coverage_90: Estimate | None
    rmse: Estimate | None


@dataclass(frozen=True, slots=True)
class ArmReport:
    """Of the answers of one arm to the callers of one side; another arm than the side's own answered as a fallback."""

    side: str
    arm: str
    measures: Measures


@dataclass(frozen=True, slots=True)
class Report:
    """The whole experiment.

    Attributes:
        since: Seconds since the epoch from which requests count.
        arms: By side and arm.
        hit_rate_difference: Canary's hit rate less stable's, by side, fallbacks included; windows as draws.
        hit_rate_difference_by_caller: The same with callers as draws.
        notes: What the reader should know.
    """

    since: float
    arms: tuple[ArmReport, ...]
    hit_rate_difference: Estimate | None
    hit_rate_difference_by_caller: Estimate | None
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def report(cells: Sequence[Cell], since: float, *, draws: int = DRAWS) -> Report:
    """Judge what the log holds.

    Args:
        cells: Labelled windows by side and arm.
        since: From when they are, for the record.
        draws: Of each bootstrap.
    """
    arms = tuple(ArmReport(cell.side, cell.arm, measure(cell, draws=draws)) for cell in cells)
    sides = [_classes([cell for cell in cells if cell.side == side]) for side in ("canary", "stable")]
    is_thin = any(arm.measures.labelled and arm.measures.callers < _FEW_CALLERS for arm in arms)
    return Report(
        since,
        arms,
        *_differences(*sides, draws=draws),
        notes=(*_NOTES, _FEW_CALLERS_NOTE) if is_thin else _NOTES,
    )


def measure(cell: Cell, *, draws: int = DRAWS) -> Measures:
    """Everything about one cell; each bootstrap draws all its figures from the same callers."""
    classes, returns = _classes([cell]), _returns(cell)
    labelled = (cell.label >= 0) | ~np.isnan(cell.realized)
    return Measures(
        requests=cell.n_requests,
        windows=cell.n_windows,
        labelled=int(labelled.sum()),
        callers=len(np.unique(cell.principal[labelled])),
        hit_rate=_proportion(classes.hit),
        **_class_losses(classes, draws),
        reliability=_reliability(classes),
        coverage_90=_proportion(returns.is_covered[returns.has_interval]),
        rmse=_root_mean_square(returns, draws),
    )


def wilson(successes: int, n: int, z: float = _Z_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, JASA 22, 1927).

    Args:
        successes: 0..n.
        n: At least 1.
        z: Half width in standard deviations.
    """
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # Rounding must not put an interval of none, or all, beside its own end.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def newcombe(one: tuple[int, int], other: tuple[int, int], z: float = _Z_95) -> tuple[float, float]:
    """Interval of the difference of two independent proportions, one less other.

    Newcombe's hybrid score interval, method 10 (Statistics in Medicine 17, 1998, 873-890).

    Args:
        one, other: Successes and trials of each; at least one trial.
        z: Half width in standard deviations.
    """
    p1, p2 = one[0] / one[1], other[0] / other[1]
    (low1, high1), (low2, high2) = wilson(*one, z), wilson(*other, z)
    difference = p1 - p2
    return (
        difference - sqrt((p1 - low1) ** 2 + (high2 - p2) ** 2),
        difference + sqrt((high1 - p1) ** 2 + (p2 - low2) ** 2),
    )


def bootstrap(
    principal: npt.NDArray[np.int64], columns: Floats, statistic: Callable[[Floats], Floats], *, draws: int = DRAWS
) -> Floats | None:
    """Draw a statistic of sums, whole callers at a time, with replacement.

    The bootstrap of clusters (Cameron, Gelbach & Miller, Review of Economics and Statistics 90, 2008, section II).

    Args:
        principal: int64[N], the caller of each window.
        columns: float64[N, K], summed over windows.
        statistic: Takes sums float64[D, K], gives the figure of each draw, float64[D, S].
        draws: D.

    Returns:
        The statistic of each draw; None with fewer than two callers, of whom nothing can be drawn.
    """
    _, caller = np.unique(principal, return_inverse=True)
    n_callers = int(caller.max(initial=-1)) + 1
    if n_callers < 2:
        return None
    sums = np.stack([np.bincount(caller, column, n_callers) for column in columns.T], axis=1)
    rng = np.random.default_rng(_SEED)
    at_once = max(1, _DRAWN_AT_ONCE // n_callers)
    counts = (min(at_once, draws - done) for done in range(0, draws, at_once))
    drawn = [_weights(rng, n, n_callers) @ sums for n in counts]
    return statistic(np.concatenate(drawn))


def _weights(rng: np.random.Generator, draws: int, n_callers: int) -> Floats:
    """How often each caller is in each draw, float64[D, G]."""
    picks = rng.integers(0, n_callers, (draws, n_callers)) + n_callers * np.arange(draws)[:, np.newaxis]
    counts = np.bincount(picks.ravel(), minlength=draws * n_callers)
    return counts.reshape(draws, n_callers).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Classes:
    """Windows whose class is known: per window, float64[N] unless said.

    Attributes:
        principal: int64[N].
        hit: bool[N].
        confidence, log_loss, brier: See `Measures`.
    """

    principal: npt.NDArray[np.int64]
    hit: npt.NDArray[np.bool_]
    confidence: Floats
    log_loss: Floats
    brier: Floats


@dataclass(frozen=True, slots=True)
class _Returns:
    """Windows whose return is known; `is_covered` counts only where `has_interval`."""

    principal: npt.NDArray[np.int64]
    squared_error: Floats
    has_interval: npt.NDArray[np.bool_]
    is_covered: npt.NDArray[np.bool_]


def _classes(cells: Sequence[Cell]) -> _Classes:
    principal = np.concatenate([np.empty(0, np.int64), *(cell.principal for cell in cells)])
    probs = np.concatenate([np.empty((0, len(CLASSES))), *(cell.probs for cell in cells)])
    label = np.concatenate([np.empty(0, np.int64), *(cell.label for cell in cells)])
    known = label >= 0
    principal, probs, label = principal[known], probs[known], label[known]
    happened = np.eye(len(CLASSES))[label]
    return _Classes(
        principal,
        hit=probs.argmax(axis=1) == label,
        confidence=probs.max(axis=1),
        log_loss=-np.log(np.maximum((probs * happened).sum(axis=1), _LEAST_PROBABILITY)),
        brier=np.square(probs - happened).sum(axis=1),
    )


def _returns(cell: Cell) -> _Returns:
    known = ~np.isnan(cell.realized)
    error = np.abs(cell.realized - cell.mean)[known]
    sd = cell.sd[known]
    return _Returns(cell.principal[known], np.square(error), ~np.isnan(sd), error <= Z_90 * sd)


def _proportion(hits: npt.NDArray[np.bool_]) -> Estimate | None:
    n, successes = len(hits), int(hits.sum())
    return Estimate(successes / n, *wilson(successes, n), "wilson", n) if n else None


def _class_losses(classes: _Classes, draws: int) -> dict[str, Estimate | None]:
    names = ("log_loss", "brier", "calibration_error")
    n = len(classes.hit)
    if n == 0:
        return dict.fromkeys(names)
    gaps = _binned(classes, classes.hit - classes.confidence)
    columns = np.column_stack([np.ones(n), classes.log_loss, classes.brier, gaps])
    drawn = bootstrap(classes.principal, columns, _losses, draws=draws)
    values = _losses(columns.sum(axis=0, keepdims=True))[0]
    return {
        name: _drawn(value, drawn, column, n) for column, (name, value) in enumerate(zip(names, values, strict=True))
    }


def _losses(sums: Floats) -> Floats:
    """Mean log loss, Brier score and calibration error, float64[D, 3], of sums float64[D, 3 + N_BINS]."""
    count, *losses = sums[:, :3].T
    means: Floats = np.column_stack([*losses, np.abs(sums[:, 3:]).sum(axis=1)]) / count[:, np.newaxis]
    return means


def _root_mean_square(returns: _Returns, draws: int) -> Estimate | None:
    n = len(returns.squared_error)
    if n == 0:
        return None

    def rms(sums: Floats) -> Floats:
        roots: Floats = np.sqrt(sums[:, 1:] / sums[:, :1])
        return roots

    columns = np.column_stack([np.ones(n), returns.squared_error])
    drawn = bootstrap(returns.principal, columns, rms, draws=draws)
    return _drawn(sqrt(returns.squared_error.mean()), drawn, 0, n)


def _differences(canary: _Classes, stable: _Classes, *, draws: int) -> tuple[Estimate | None, Estimate | None]:
    n1, n2 = len(canary.hit), len(stable.hit)
    if n1 == 0 or n2 == 0:
        return None, None
    hits1, hits2 = int(canary.hit.sum()), int(stable.hit.sum())
    value = hits1 / n1 - hits2 / n2
    by_window = Estimate(value, *newcombe((hits1, n1), (hits2, n2)), "newcombe", n1 + n2)
    return by_window, _drawn(value, _drawn_differences(canary, stable, draws), 0, n1 + n2)


def _drawn_differences(canary: _Classes, stable: _Classes, draws: int) -> Floats | None:
    """Drawn over both sides at once: while the share grows, a caller may have been on either."""
    columns = np.zeros((len(canary.hit) + len(stable.hit), 4))
    for first, rows, side in ((0, slice(len(canary.hit)), canary), (2, slice(len(canary.hit), None), stable)):
        columns[rows, first], columns[rows, first + 1] = 1, side.hit
    principal = np.concatenate([canary.principal, stable.principal])
    sums = bootstrap(principal, columns, lambda sums: sums, draws=draws)
    if sums is None:
        return None
    sums = sums[(sums[:, 0] > 0) & (sums[:, 2] > 0)]  # a draw without one side says nothing of the difference
    differences: Floats = sums[:, 1:2] / sums[:, 0:1] - sums[:, 3:4] / sums[:, 2:3]
    return differences if len(differences) >= draws / 2 else None


def _drawn(value: float, drawn: Floats | None, column: int, n: int) -> Estimate:
    if drawn is None:
        return Estimate(float(value), None, None, "bootstrap-by-caller", n)
    low, high = np.quantile(drawn[:, column], [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), "bootstrap-by-caller", n)


def _bins_of(confidence: Floats) -> npt.NDArray[np.int64]:
    return np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)


def _binned(classes: _Classes, values: Floats) -> Floats:
    """The values, each in the column of its bin, float64[N, N_BINS]."""
    table = np.zeros((len(values), N_BINS))
    table[np.arange(len(values)), _bins_of(classes.confidence)] = values
    return table


def _reliability(classes: _Classes) -> tuple[Bin, ...]:
    bins = _bins_of(classes.confidence)
    counts = np.bincount(bins, minlength=N_BINS)
    confidence, hits = (np.bincount(bins, values, N_BINS) for values in (classes.confidence, classes.hit))
    return tuple(
        Bin(i / N_BINS, (i + 1) / N_BINS, int(n), float(confidence[i] / n), float(hits[i] / n))
        for i, n in enumerate(counts)
        if n
    )
