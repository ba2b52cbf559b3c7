"""Models in memory by version: at most so many, idle ones let go by time and by use, those with an alias never."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine import Engine


class NoRoom(Exception):
    """Every model here has an alias or answers a call just now."""


@dataclass(slots=True)
class _Held:
    engine: Engine
    used_at: float
    calls: int = 0


class ModelCache:
    """Engines by version, for one event loop; it decides, and leaves loading and clean-up to its owner.

    Args:
        size: Most engines.
        ttl_s: Seconds without a call after which an engine is let go.
        clock: Seconds, monotonic.
    """

    def __init__(self, *, size: int, ttl_s: float, clock: Callable[[], float]) -> None:
        if size < 1:
            raise ValueError("the cache must hold at least one model")
        self._size = size
        self._ttl_s = ttl_s
        self._clock = clock
        self._held: OrderedDict[str, _Held] = OrderedDict()  # least recently used first
        self.aliased: frozenset[str] = frozenset()

    def __contains__(self, version: str) -> bool:
        return version in self._held

    def __getitem__(self, version: str) -> Engine:
        return self._held[version].engine

    @property
    def versions(self) -> list[str]:
        """Those held, sorted."""
        return sorted(self._held)

    @contextmanager
    def using(self, version: str) -> Iterator[None]:
        """Keep a version that is held while a call needs it. Raises `KeyError`."""
        held = self._held[version]
        held.calls += 1
        try:
            yield
        finally:
            held.calls -= 1
            held.used_at = self._clock()
            self._held.move_to_end(version)

    def put(self, engine: Engine) -> None:
        """Hold an engine for which `make_room` found a place."""
        assert len(self._held) < self._size
        self._held[engine.model_version] = _Held(engine, self._clock())

    def make_room(self) -> list[Engine]:
        """Let the least recently used go until one more fits.

        Raises:
            NoRoom: None may go.
        """
        idle = self._idle()
        surplus = len(self._held) + 1 - self._size
        if surplus > len(idle):
            raise NoRoom
        return [self._held.pop(version).engine for version in idle[: max(surplus, 0)]]

    def expire(self) -> list[Engine]:
        """Let go what was not used for the time to live."""
        before = self._clock() - self._ttl_s
        expired = [version for version in self._idle() if self._held[version].used_at <= before]
        return [self._held.pop(version).engine for version in expired]

    def _idle(self) -> list[str]:
        """Versions that may go, least recently used first."""
        return [version for version, held in self._held.items() if not held.calls and version not in self.aliased]
