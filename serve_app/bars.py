"""The daily bars that ship with the project, adjusted for splits and dividends; `data/NOTICE.md` has their source."""

from __future__ import annotations

import csv
import gzip
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

SYMBOLS: tuple[str, ...] = ("AAPL", "FB", "GOOG", "IBM", "MSFT")
DATA_FILE = Path(__file__).parent / "data" / "daily_bars.csv.gz"

_COLUMNS = ("Open", "High", "Low", "Close", "Volume", "Adj Close")


@dataclass(frozen=True, slots=True)
class Bars:
    """The history of one symbol, oldest first.

    Attributes:
        symbol: One of `SYMBOLS`.
        dates: datetime64[D][n], trading days.
        ohlcv: float64[n,5], open, high, low, close in adjusted dollars and volume in adjusted shares; read-only.
    """

    symbol: str
    dates: npt.NDArray[np.datetime64]
    ohlcv: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.dates)


def load_bars(symbol: str) -> Bars:
    """Read one symbol's bars.

    Raises:
        ValueError: The symbol is not shipped.
    """
    if symbol not in SYMBOLS:
        raise ValueError(f"no bars for {symbol!r}; there are {', '.join(SYMBOLS)}")
    return _read_all()[symbol]


def data_hash() -> str:
    """SHA-256 of the shipped file, for the manifest of what is trained on it."""
    return hashlib.sha256(DATA_FILE.read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def _read_all() -> dict[str, Bars]:
    rows: dict[str, list[dict[str, str]]] = {symbol: [] for symbol in SYMBOLS}
    with gzip.open(DATA_FILE, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows[row["Ticker"]].append(row)
    return {symbol: _adjusted(symbol, of_symbol) for symbol, of_symbol in rows.items()}


def _adjusted(symbol: str, rows: list[dict[str, str]]) -> Bars:
    dates = np.array([row["Date"] for row in rows], dtype="datetime64[D]")
    raw = np.array([[float(row[column]) for column in _COLUMNS] for row in rows])
    factor = raw[:, 5] / raw[:, 3]
    ohlcv = np.column_stack([raw[:, :4] * factor[:, None], raw[:, 4] / factor])
    ohlcv.flags.writeable = False
    return Bars(symbol, dates, ohlcv)
