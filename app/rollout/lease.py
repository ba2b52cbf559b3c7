"""One controller acts at a time: whoever holds the lease."""

from __future__ import annotations

import secrets
from typing import Protocol

from app.shared.commands import Link, RedisAway, Script

_KEY = "sluice:rollout:controller"
_TIMEOUT_S = 0.25
_LEASE_MS = 3000  # a controller that is gone is missed after so long

_HOLD = Script(
    """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
    return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)
_RELEASE = Script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end
return 1
"""
)


class Lease(Protocol):
    """The right to act, for some seconds at a time.

    It keeps two controllers from working against each other, not from acting at all: every change is written on the
    condition that nothing else was written since it was decided.
    """

    async def hold(self) -> bool:
        """Take it, or keep it; False where somebody else has it, or nobody can say."""

    async def release(self) -> None:
        """Let the next one have it at once."""


class LoneLease:
    """Of a controller that has no others beside it."""

    async def hold(self) -> bool:
        return True

    async def release(self) -> None: ...


class RedisLease:
    """A key in the shared Redis that expires.

    Args:
        link: To Redis, for this object alone.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._name = secrets.token_hex(16)

    async def hold(self) -> bool:
        return await self._run(_HOLD, self._name, _LEASE_MS)

    async def release(self) -> None:
        await self._run(_RELEASE, self._name)
        await self._link.close()

    async def _run(self, script: Script, *args: str | int) -> bool:
        try:
            [answer] = await self._link.ask([script.call([_KEY], args)], _TIMEOUT_S)
        except RedisAway:
            return False
        return bool(answer == 1)
