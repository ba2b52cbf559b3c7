"""Results read: rows found by what they measured, medians over rounds, ratios inside rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Results = Mapping[str, Any]
Figure = Callable[[Row], float | None]


@dataclass(frozen=True, slots=True)
class Key:
    """What a row measured, rounds apart."""

    system: str
    model: str
    lane: str
    connections: int = 32
    windows: int = 1
    loop: str = "closed"

    @classmethod
    def of(cls, row: Row) -> Key:
        return cls(row["system"], row["model"], row["lane"], row["connections"], row["windows"], row["loop"])


class Spread(NamedTuple):
    """A figure over the rounds."""

    median: float
    low: float
    high: float


def rps(row: Row) -> float:
    return float(row["answered_rps"])


def p99_ms(row: Row) -> float | None:
    value = row["latency_ms"]["p99"]
    return None if value is None else float(value)


def p50_ms(row: Row) -> float | None:
    value = row["latency_ms"]["p50"]
    return None if value is None else float(value)


def cpu_ms(row: Row) -> float:
    """CPU milliseconds of the whole system per answered request, the generator not counted."""
    return float(sum(ms for role, ms in row["cpu_ms"].items() if role != "generator"))


def n_failed(row: Row) -> float:
    return float(sum(row["failed"].values()))


def by_round(results: Results, key: Key) -> dict[int, Row]:
    """The rows of one key by round; rounds without a measurement are left out."""
    return {row["round"]: row for row in results["rows"] if "error" not in row and Key.of(row) == key}


def keys(results: Results) -> list[Key]:
    """What was measured at all, in the order it first was."""
    return list(dict.fromkeys(Key.of(row) for row in results["rows"] if "error" not in row))


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median and extremes of the values that are there; None without any."""
    found = [value for value in values if value is not None]
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def over_rounds(results: Results, key: Key, figure: Figure) -> Spread | None:
    """A figure's spread over the rounds."""
    return spread(figure(row) for row in by_round(results, key).values())


def ratio(results: Results, over: Key, under: Key, figure: Figure) -> Spread | None:
    """A figure of one key over that of another, round by round; only rounds that have both count."""
    upper, lower = by_round(results, over), by_round(results, under)
    pairs = [(figure(upper[number]), figure(lower[number])) for number in upper.keys() & lower.keys()]
    return spread(a / b for a, b in pairs if a is not None and b)


def share_of_bare(results: Results, key: Key, batch: int = 32) -> Spread | None:
    """Served windows per second over those of the bare engine in the same round."""
    bare = {row["round"]: row for row in results["bare"] if (row["model"], row["batch"]) == (key.model, batch)}
    rows = by_round(results, key)
    return spread(rows[n]["windows_per_s"] / bare[n]["windows_per_s"] for n in rows.keys() & bare.keys())
