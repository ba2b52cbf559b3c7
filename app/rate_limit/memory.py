"""Limits counted in this process's memory."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from limits.aio.storage import MovingWindowSupport, Storage

from app.rate_limit import WINDOW_S, Allowance, Mode, Quota

_SLICE_S = 1
_SLICES = WINDOW_S // _SLICE_S + 1  # the oldest is dropped when its last moment is a whole window ago


class LocalLimiter:
    """The limit of one policy over the counters of this process.

    Args:
        counters: Where the counts are; policies may share them.
        quota: Units per minute of each account.
        policy: Name in headers and keys.
        mode: What the allowances say of who counted.
    """

    def __init__(
        self, counters: MinuteCounters, *, quota: Quota, policy: str = "predict", mode: Mode = "memory"
    ) -> None:
        self._counters = counters
        self._quota = quota
        self._policy = policy
        self._mode = mode

    async def spend(self, account: str, cost: int) -> Allowance:
        """Count `cost` units against the account, or refuse and count nothing."""
        key = f"{self._policy}/{account}"
        limit, counters = self._quota.of(account), self._counters
        admitted = await counters.acquire_entry(key, limit, WINDOW_S, cost)
        used = counters.total(key)
        wait_s = counters.wait_s(key, used - 1 if admitted else limit - cost)
        return Allowance(
            admitted, limit, WINDOW_S, max(0, limit - used), max(1, math.ceil(wait_s)), self._policy, self._mode
        )

    def refuse(self, account: str, wait_s: float) -> Allowance:
        """A refusal that rests on something else than the counters here."""
        limit = self._quota.of(account)
        return Allowance(False, limit, WINDOW_S, 0, max(1, math.ceil(wait_s)), self._policy, self._mode)

    def record(self, account: str, cost: int) -> None:
        """Count what was admitted elsewhere."""
        self._counters.add(f"{self._policy}/{account}", cost)


class MinuteCounters(Storage, MovingWindowSupport):
    """A moving window of one minute for `limits`, in this process's memory.

    The library's own memory storage keeps an entry per unit spent (60,000 of them at the default limit), looks at
    every key, in a new task, on every hit, and reads the wall clock. Here one second's spending is kept together and
    dropped together when all of it is a minute old, so that a hit costs the same whatever was spent and by how many,
    in no minute more than the limit is admitted, there is nothing to stop at shutdown, and the clock is given.

    Args:
        clock: Monotonic seconds.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._now = -1
        self._slices: deque[tuple[int, dict[str, int]]] = deque()  # by when they began, in slices of the clock
        self._totals: dict[str, int] = {}

    def total(self, key: str) -> int:
        """Units spent in the last minute; those of up to one second more still count."""
        self._drop_old()
        return self._totals.get(key, 0)

    def add(self, key: str, amount: int) -> None:
        """Count units as spent now."""
        self._drop_old()
        if not self._slices or self._slices[-1][0] != self._now:
            self._slices.append((self._now, {}))
        spent = self._slices[-1][1]
        spent[key] = spent.get(key, 0) + amount
        self._totals[key] = self._totals.get(key, 0) + amount

    def take(self) -> dict[str, int]:
        """Units spent in the last minute, by key; they are forgotten here."""
        self._drop_old()
        totals, self._totals = self._totals, {}
        self._slices.clear()
        return totals

    def wait_s(self, key: str, room: int) -> float:
        """Seconds until at most `room` units are left of what is spent now."""
        if room < 0:
            return WINDOW_S  # more than the whole limit: no wait would help
        left = self.total(key)
        if left <= room:
            return 0.0
        for began, spent in self._slices:
            left -= spent.get(key, 0)
            if left <= room:
                return (began + _SLICES) * _SLICE_S - self._clock()
        return 0.0

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        if self.total(key) + amount > limit:
            return False
        self.add(key, amount)
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        return self._clock() + self.wait_s(key, self.total(key) - 1) - WINDOW_S, self.total(key)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        self.add(key, amount)
        return self._totals[key]

    async def get(self, key: str) -> int:
        return self.total(key)

    async def get_expiry(self, key: str) -> float:
        return self._clock() + self.wait_s(key, 0)

    async def check(self) -> bool:
        return True

    async def clear(self, key: str) -> None:
        self._totals.pop(key, None)
        for _, spent in self._slices:
            spent.pop(key, None)

    async def reset(self) -> int:
        count = len(self._totals)
        self._totals.clear()
        self._slices.clear()
        return count

    def _drop_old(self) -> None:
        now = int(self._clock() // _SLICE_S)
        if now == self._now:
            return
        self._now = now
        while self._slices and self._slices[0][0] <= now - _SLICES:
            for key, amount in self._slices.popleft()[1].items():
                self._totals[key] -= amount
                if not self._totals[key]:
                    del self._totals[key]
