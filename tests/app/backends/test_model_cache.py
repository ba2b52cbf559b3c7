"""Which versions stay in memory, on a clock moved by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.backends.model_cache import ModelCache, NoRoom
from tests.app.under_test import FakeClock


class Cache(ModelCache):
    """Three places, ten seconds, and shorter words."""

    def __init__(self) -> None:
        self.clock = FakeClock(100.0)
        super().__init__(size=3, ttl_s=10.0, clock=self.clock)

    def fill(self, *versions: str) -> list[str]:
        gone = [engine.model_version for version in versions for engine in self._filled(version)]
        return gone

    def _filled(self, version: str) -> list[Any]:
        gone = self.make_room()
        self.put(SimpleNamespace(model_version=version))  # type: ignore[arg-type]
        return gone

    def use(self, version: str) -> None:
        with self.using(version):
            pass

    def expired(self) -> list[str]:
        return [engine.model_version for engine in self.expire()]


def test_the_one_that_was_not_used_for_longest_makes_room() -> None:
    cache = Cache()
    assert cache.fill("1", "2", "3") == []
    cache.use("1")
    assert cache.fill("4") == ["2"]
    assert cache.versions == ["1", "3", "4"]


def test_never_more_than_the_size_are_held() -> None:
    cache = Cache()
    cache.fill(*map(str, range(20)))
    assert cache.versions == ["17", "18", "19"]


def test_idle_for_the_time_to_live_is_let_go_and_a_moment_less_is_not() -> None:
    cache = Cache()
    cache.fill("1", "2")
    cache.clock.advance(9.0)
    cache.use("2")
    assert cache.expired() == []
    cache.clock.advance(1.0)
    assert cache.expired() == ["1"]
    assert cache.versions == ["2"]


def test_an_alias_keeps_a_version_by_time_and_by_use() -> None:
    cache = Cache()
    cache.fill("1", "2", "3")
    cache.aliased = frozenset({"1", "2"})
    assert cache.fill("4") == ["3"]
    cache.clock.advance(1000.0)
    assert cache.expired() == ["4"]
    cache.fill("5")
    cache.aliased = frozenset({"1", "2", "5"})
    with pytest.raises(NoRoom):
        cache.make_room()


def test_a_version_that_answers_a_call_stays_until_it_has_answered() -> None:
    cache = Cache()
    cache.fill("1")
    with cache.using("1"):
        cache.clock.advance(1000.0)
        assert cache.expired() == []
        cache.fill("2", "3")
        assert cache.fill("4") == ["2"]
    assert cache.expired() == [], "it was used until just now"
    cache.clock.advance(10.0)
    assert "1" in cache.expired()


def test_a_cache_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ModelCache(size=0, ttl_s=1, clock=FakeClock(0))
