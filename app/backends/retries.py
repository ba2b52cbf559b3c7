"""How many calls may be sent a second time: few, so that a fault is not answered with twice the load."""

from __future__ import annotations

from collections.abc import Callable

SHARE = 0.1
FLOOR_PER_S = 1.0
BURST = 10.0


class RetryBudget:
    """A bucket of tokens: every first try earns a tenth of one, time a few, and each retry takes a whole one.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = BURST
        self._filled_at = clock()

    def earn(self) -> None:
        """A call is sent for the first time."""
        self._tokens = min(self._tokens + SHARE, BURST)

    def spend(self) -> bool:
        """Take what a retry costs; False where that is not there."""
        now = self._clock()
        self._tokens = min(self._tokens + FLOOR_PER_S * (now - self._filled_at), BURST)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
