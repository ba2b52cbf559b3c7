"""What was seen of the two arms: plain counts, which add up over workers, gateways and time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Literal

Side = Literal["stable", "canary"]
SIDES: tuple[Side, ...] = ("stable", "canary")

# Upper bounds of the latency buckets in seconds, each a tenth above the one before, from 1 ms to 4.4 s; one more takes
# the rest.
LATENCY_BOUNDS_S: tuple[float, ...] = tuple(0.001 * 1.1**i for i in range(89))

N_CLASSES = 3

# Names of the counts. `{side}_…` is of live answers; `shadow_…` of windows that both arms have answered.
_LIVE = ("requests", "errors", "invalid", *(f"latency_{i}" for i in range(len(LATENCY_BOUNDS_S) + 1)))
_SHADOW = (
    "shadow_windows",
    "shadow_disagreements",
    "shadow_gaps",
    "shadow_outside_interval",
    *(f"shadow_pair_{i}_{j}" for i in range(N_CLASSES) for j in range(N_CLASSES)),
)
NAMES: frozenset[str] = frozenset((*(f"{side}_{name}" for side in SIDES for name in _LIVE), *_SHADOW))


class Evidence:
    """Counts since some beginning; cheap to add to on the request path, and to send as differences.

    Counts are whole numbers, so adding evidence up is exact in any order. Names are those of `NAMES`.
    """

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts: dict[str, int] = dict(counts or {})

    def count_answer(self, side: Side, seconds: float) -> None:
        """An answer of the arm, `seconds` after the request came."""
        self._add(f"{side}_requests")
        self._add(f"{side}_latency_{bisect_left(LATENCY_BOUNDS_S, seconds)}")

    def count_given_up(self, side: Side, seconds: float) -> None:
        """Nobody waited longer than `seconds`: that says how slow the arm is at least, and not that it answers."""
        self._add(f"{side}_latency_{bisect_left(LATENCY_BOUNDS_S, seconds)}")

    def count_failure(self, side: Side, *, invalid: bool = False) -> None:
        """The arm gave no answer; `invalid` where its model gave one that had to be withheld. Both are errors."""
        self._add(f"{side}_requests")
        self._add(f"{side}_errors")
        if invalid:
            self._add(f"{side}_invalid")

    def count_shadow(self, stable_class: int, canary_class: int, *, outside_interval: bool | None) -> None:
        """One window that both arms have answered, with the class that each chose.

        Args:
            stable_class: Of the stable arm.
            canary_class: Of the canary.
            outside_interval: Whether the expected returns are too far apart, None where an arm does not tell its
                uncertainty.
        """
        self._add("shadow_windows")
        self._add(f"shadow_pair_{stable_class}_{canary_class}")
        if stable_class != canary_class:
            self._add("shadow_disagreements")
        if outside_interval is not None:
            self._add("shadow_gaps")
        if outside_interval:
            self._add("shadow_outside_interval")

    def add(self, other: Evidence) -> None:
        for name, count in other.counts.items():
            self._add(name, count)

    def since(self, earlier: Evidence) -> Evidence:
        """What came after `earlier`, whose counts are all at most ours."""
        return Evidence({name: n - earlier.counts.get(name, 0) for name, n in self.counts.items()})

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Evidence) and _nonzero(self) == _nonzero(other)

    __hash__ = None  # type: ignore[assignment]  # counts change

    def _add(self, name: str, count: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + count


def _nonzero(evidence: Evidence) -> dict[str, int]:
    return {name: n for name, n in evidence.counts.items() if n}
