"""State that several workers and gateways share: in Redis, with a copy in each gateway's files."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from app.rollout.state import StateAway, StateConflict, StateStore, StateUnreadable, Stored, format_stored, parse_stored
from app.shared.commands import BadKey, Command, Link, RedisAway, Script

_LOGGER = logging.getLogger(__name__)

_KEY_PREFIX = "sluice:state:"
_TIMEOUT_S = 0.25  # no request waits for it but one that changes the state

_WRITE = Script(
    """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then
    redis.call('DEL', KEYS[1])
end
local stored = tonumber(redis.call('HGET', KEYS[1], 'version') or 0) or 0
if stored >= tonumber(ARGV[1]) then
    return 0
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'document', ARGV[2])
return 1
"""
)


class RedisStore:
    """A store in the shared Redis.

    Args:
        link: To Redis, for this object alone.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def read(self, name: str) -> Stored | None:
        """The newest document; None where there is none, or something that nobody can read and a write replaces."""
        try:
            text = await self._ask(Command(None, ("HGET", _KEY_PREFIX + name, "document")))
            return None if text is None else parse_stored(text)
        except (BadKey, ValueError):
            return None

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        text = format_stored(document, version)
        if await self._ask(_WRITE.call([_KEY_PREFIX + name], [version, text])) != 1:
            raise StateConflict

    async def close(self) -> None:
        await self._link.close()

    async def _ask(self, command: Command) -> Any:
        try:
            [answer] = await self._link.ask([command], _TIMEOUT_S)
        except RedisAway as away:
            raise StateAway(str(away)) from None
        if isinstance(answer, BadKey):
            raise answer
        if isinstance(answer, RedisAway):
            raise StateAway(str(answer))
        return answer


class CopiedStore:
    """A shared store with a copy at hand, which answers while the shared one is away, and fills it when it comes empty.

    What is written while the shared store is away is refused: nobody else would see it, and later one of two truths
    would be lost. The document of the highest version is the truth, wherever it is found.

    Args:
        shared: What all gateways write to.
        copy: This gateway's own.
    """

    def __init__(self, shared: StateStore, copy: StateStore) -> None:
        self._shared = shared
        self._copy = copy
        self._newest: dict[str, Stored | None] = {}

    async def read(self, name: str) -> Stored | None:
        if name not in self._newest:
            self._newest[name] = await self._copy.read(name)
        ours = self._newest[name]
        try:
            theirs = await self._shared.read(name)
        except StateAway:
            return ours
        if theirs is not None and (ours is None or theirs.version > ours.version):
            await self._keep(name, theirs)
            return theirs
        if ours is not None and (theirs is None or theirs.version < ours.version):
            with suppress(StateAway, StateConflict):  # the shared store forgot: a restart without its memory
                await self._shared.write(name, ours.document, ours.version)
        return ours

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        await self._shared.write(name, document, version)
        await self._keep(name, Stored(document, version))

    async def close(self) -> None:
        await self._shared.close()
        await self._copy.close()

    async def _keep(self, name: str, stored: Stored) -> None:
        """Copy what is in force already, as well as the disk allows."""
        self._newest[name] = stored
        try:
            with suppress(StateConflict):  # another worker of this gateway was quicker
                await self._copy.write(name, stored.document, stored.version)
        except (OSError, StateUnreadable) as error:
            _LOGGER.warning("no copy of the state %s was kept: %s", name, error)
