"""How many windows a principal may have predicted per minute.

A sliding-window counter: it weighs the last fixed window by the part that still reaches into the sliding one, so two
numbers per principal suffice, where a moving window keeps an entry per window spent (60,000 of them at the default
limit), and a fixed window lets twice the limit through at its edge.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from limits.aio.storage import SlidingWindowCounterSupport, Storage

_WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left after a request was counted or refused.

    Attributes:
        admitted: False when the request was refused; it has then spent nothing.
        limit: Windows per `window_s`.
        window_s: Seconds.
        remaining: Windows that may still be spent now.
        reset_s: Whole seconds until the quota recovers; for a refused request, until it would be admitted.
        policy: Name of the limit.
    """

    admitted: bool
    limit: int
    window_s: int
    remaining: int
    reset_s: int
    policy: str

    def headers(self) -> dict[str, str]:
        """Fields of draft-ietf-httpapi-ratelimit-headers-11, sections 3 and 4."""
        return {
            "RateLimit-Policy": f'"{self.policy}";q={self.limit};w={self.window_s}',
            "RateLimit": f'"{self.policy}";r={self.remaining};t={self.reset_s}',
        }


class RateLimiter(Protocol):
    """Decides whether an account may spend `cost` windows now, and counts them if so."""

    async def spend(self, account: str, cost: int) -> Allowance: ...


class SlidingWindowLimiter:
    """The limit of one policy, over the sliding-window counters of a storage of the library `limits`.

    Args:
        storage: Where the counters are.
        limit: Windows per minute.
        policy: Name in headers and keys.
    """

    def __init__(self, storage: Counters, *, limit: int, policy: str = "predict") -> None:
        self._storage = storage
        self._limit = limit
        self._policy = policy

    async def spend(self, account: str, cost: int) -> Allowance:
        """Count `cost` windows against the account, or refuse and count nothing."""
        key = f"{self._policy}/{account}"
        limit = self._limit
        admitted = await self._storage.acquire_sliding_window_entry(key, limit, _WINDOW_S, cost)
        previous, previous_ttl_s, current, current_ttl_s = await self._storage.get_sliding_window(key, _WINDOW_S)
        left_s = current_ttl_s - _WINDOW_S  # the library's counters live for two windows
        used = math.floor(previous * previous_ttl_s / _WINDOW_S + current)
        wait_s = left_s if admitted else _wait_s(previous, current, left_s, limit - cost)
        return Allowance(admitted, limit, _WINDOW_S, max(0, limit - used), max(1, math.ceil(wait_s)), self._policy)


def _wait_s(previous: int, current: int, left_s: float, room: int) -> float:
    """Seconds until the weighted count has fallen to `room`.

    The count is previous · left / W + current until the window ends in `left_s`; from then on it is what
    `current` still weighs as the last window, if nothing else is spent.
    """
    if room < 0:
        return _WINDOW_S  # more than the whole limit: no wait would help
    if current <= room and previous > 0:
        return max(0.0, left_s - (room - current) * _WINDOW_S / previous)
    return left_s + max(0.0, _WINDOW_S * (1 - room / current)) if current else left_s


class Counters(Storage, SlidingWindowCounterSupport):
    """Counters in this process's memory, for `limits`.

    The library's own memory storage looks at every key, in a new task, on every hit, and reads the wall clock.
    Here the counters of a fixed window are dropped together when it has passed, so a hit costs the same for one
    principal and for a hundred thousand, there is nothing to stop at shutdown, and the clock is given.

    Args:
        clock: Monotonic seconds.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._window = 0
        self._current: Counter[str] = Counter()
        self._previous: Counter[str] = Counter()

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        previous, previous_ttl_s, current, _ = self._look(key)
        if math.floor(previous * previous_ttl_s / _WINDOW_S + current) + amount > limit:
            return False
        self._current[key] += amount
        return True

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        return self._look(key)

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        await self.clear(key)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        self._look(key)
        self._current[key] += amount
        return self._current[key]

    async def get(self, key: str) -> int:
        return self._look(key)[2]

    async def get_expiry(self, key: str) -> float:
        return self._clock() + self._look(key)[3]

    async def check(self) -> bool:
        return True

    async def clear(self, key: str) -> None:
        self._current.pop(key, None)
        self._previous.pop(key, None)

    async def reset(self) -> int:
        count = len(self._current.keys() | self._previous.keys())
        self._current.clear()
        self._previous.clear()
        return count

    def _look(self, key: str) -> tuple[int, float, int, float]:
        """Last window's count, seconds that it still weighs, this window's count, seconds until it weighs nothing."""
        window, elapsed_s = divmod(self._clock(), _WINDOW_S)
        if window != self._window:
            self._previous = self._current if window == self._window + 1 else Counter()
            self._current = Counter()
            self._window = int(window)
        left_s = _WINDOW_S - elapsed_s
        return self._previous[key], left_s, self._current[key], left_s + _WINDOW_S
