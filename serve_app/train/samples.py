"""What models are trained and judged on: windows of features, the return that followed, and purged splits of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from serve_app.bars import Bars
from serve_app.contract import N_STEPS, FloatArray
from serve_app.features import FEATURE_NAMES, HISTORY, features

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Days = npt.NDArray[np.datetime64]

DOWN, FLAT, UP = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Samples:
    """N windows with their labels; windows are cut out of one table of features when they are asked for.

    Attributes:
        table: float32[R,F], features of every bar of every symbol, symbol after symbol.
        ends: int64[N], row of `table` that is the window's last bar.
        y: float64[N], the return over the horizon after that bar, in units of the volatility known at that bar.
        labels: int64[N], DOWN, FLAT or UP: y below, within or above ± the threshold.
        dates: datetime64[D][N], day of the window's last bar.
        label_dates: datetime64[D][N], day on which the label became known.
        n_steps: T.
    """

    table: FloatArray
    ends: Integers
    y: Floats
    labels: Integers
    dates: Days
    label_dates: Days
    n_steps: int = N_STEPS

    def __len__(self) -> int:
        return len(self.ends)

    def windows(self, rows: Integers) -> FloatArray:
        """Windows float32[B,F,T], oldest step first."""
        steps = self.ends[rows][:, None] + np.arange(1 - self.n_steps, 1)  # [B,T]
        return np.ascontiguousarray(self.table[steps].transpose(0, 2, 1))

    def last_bars(self, rows: Integers) -> FloatArray:
        """Features float32[B,F] of each window's last bar, all that a linear model sees."""
        return self.table[self.ends[rows]]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of `Samples` for one fit: to learn from, to choose by, to judge on."""

    name: str
    train: Integers
    validation: Integers
    test: Integers


def make_samples(all_bars: Iterable[Bars], *, horizon: int, threshold: float) -> Samples:
    """Label every bar that has a whole window before it and a whole horizon after it.

    Args:
        all_bars: One history for each symbol.
        horizon: h, bars from the window's end to the label's.
        threshold: Half width of the class FLAT, in volatilities.

    Returns:
        Samples with y = ln(close[t+h] / close[t]) / (s_t √h), s_t the volatility behind the feature `lnvol60`.
    """
    tables, ends, y, dates, label_dates = [], [], [], [], []
    offset = 0
    for bars in all_bars:
        table = features(bars.ohlcv)  # row i is bar i + HISTORY
        t = np.arange(N_STEPS - 1, len(table) - horizon)
        close = np.log(bars.ohlcv[HISTORY:, 3])
        s = np.exp(table[t, FEATURE_NAMES.index("lnvol60")])
        tables.append(table.astype(np.float32))
        ends.append(offset + t)
        y.append((close[t + horizon] - close[t]) / (s * np.sqrt(horizon)))
        dates.append(bars.dates[HISTORY + t])
        label_dates.append(bars.dates[HISTORY + t + horizon])
        offset += len(table)
    target = np.concatenate(y)
    return Samples(
        table=np.concatenate(tables),
        ends=np.concatenate(ends),
        y=target,
        labels=np.digitize(target, [-threshold, threshold]).astype(np.int64),
        dates=np.concatenate(dates),
        label_dates=np.concatenate(label_dates),
    )


def walk_forward(samples: Samples, starts: Sequence[str], *, validation_days: int, embargo_days: int) -> list[Split]:
    """Expanding folds: each tests on the time from its start to the next, and learns from what was known well before.

    Args:
        samples: What to split.
        starts: First day of each test block, ISO dates in order; the last block runs to the end.
        validation_days: Calendar days before a test block that are kept for choosing.
        embargo_days: Calendar days that must lie between the last label of one block and the next block.
    """
    days = [*np.array(starts, dtype="datetime64[D]"), samples.dates.max() + 1]
    splits = []
    for start, stop in pairwise(days):
        train, validation = _known_before(samples, start, validation_days, embargo_days)
        test = np.flatnonzero((samples.dates >= start) & (samples.dates < stop))
        splits.append(Split(str(start), train, validation, test))
    return splits


def split_before(samples: Samples, start: np.datetime64, *, validation_days: int, embargo_days: int) -> Split:
    """One split that learns from what was known well before a day, and tests on all that became known from it on."""
    train, validation = _known_before(samples, start, validation_days, embargo_days)
    return Split(str(start), train, validation, np.flatnonzero(samples.label_dates >= start))


def _known_before(
    samples: Samples, start: np.datetime64, validation_days: int, embargo_days: int
) -> tuple[Integers, Integers]:
    """Rows for training and, after them, for validation; labels of each known `embargo_days` before the next block."""
    validation_start = start - validation_days
    known = samples.label_dates
    train = np.flatnonzero(known < validation_start - embargo_days)
    return train, np.flatnonzero((samples.dates >= validation_start) & (known < start - embargo_days))
