"""How much an account may ask for: so many windows, or requests, in any minute, and so many at a time.

    SharedLimiter ──► SharedCounters ──► Redis          one count for all workers and gateways
        └── while Redis is away ──► LocalLimiter        each worker counts its own, up to its part of the limit

What was admitted stays spent, also where we could not answer it then (503, 504): the limit is on asking, and a
failure of ours is the worst time to let everybody ask again without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from app.rate_limit.concurrency import Concurrency

WINDOW_S = 60

Mode = Literal["memory", "shared", "local"]


@dataclass(frozen=True, slots=True)
class Quota:
    """How many units an account may spend in a window.

    Attributes:
        default: Of every account that has none of its own.
        own: Of single accounts.
    """

    default: int
    own: Mapping[str, int] = field(default_factory=dict)

    def of(self, account: str) -> int:
        """Units of this account."""
        return self.own.get(account, self.default)

    def divided(self, parts: int) -> Quota:
        """The part of one of several who count by themselves, one unit at least."""
        return Quota(max(1, self.default // parts), {name: max(1, units // parts) for name, units in self.own.items()})


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left after a request was counted or refused.

    Attributes:
        admitted: False when the request was refused; it has then spent nothing.
        limit: Units per `window_s`: windows, or requests.
        window_s: Seconds.
        remaining: Units that may still be spent now.
        reset_s: Whole seconds until some of the quota is back; for a refused request, until it would be admitted.
        policy: Name of the limit.
        mode: Who counted: this worker alone by design, all workers together, or this worker while Redis is away.
    """

    admitted: bool
    limit: int
    window_s: int
    remaining: int
    reset_s: int
    policy: str
    mode: Mode = "memory"

    def headers(self) -> dict[str, str]:
        """Fields of draft-ietf-httpapi-ratelimit-headers-11, sections 3 and 4, and how they were counted if oddly."""
        headers = {
            "RateLimit-Policy": f'"{self.policy}";q={self.limit};w={self.window_s}',
            "RateLimit": f'"{self.policy}";r={self.remaining};t={self.reset_s}',
        }
        if self.mode == "local":
            headers["X-RateLimit-Mode"] = "local"
        return headers


class RateLimiter(Protocol):
    """Decides whether an account may spend `cost` units now, and counts them if so."""

    async def spend(self, account: str, cost: int) -> Allowance: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one gateway's worker.

    Attributes:
        predict: Of windows to predict.
        ops: Of requests for anything else that needs a token.
        concurrency: Of predictions under way.
    """

    predict: RateLimiter
    ops: RateLimiter
    concurrency: Concurrency
