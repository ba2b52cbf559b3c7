"""State that several workers and gateways share: in Redis, with a copy in each gateway's files."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from app.rollout.state import (
    Check,
    SharedStore,
    StateAway,
    StateConflict,
    StateDoubtful,
    StateStore,
    StateUnreadable,
    Stored,
    check_nothing,
    format_stored,
    parse_stored,
)
from app.shared.commands import BadKey, Command, Link, RedisAway, Script

_LOGGER = logging.getLogger(__name__)

_KEY_PREFIX = "sluice:state:"
_TIMEOUT_S = 0.25  # no request waits for it but one that changes the state
_SETTLING_MS = 500  # a store that came empty: every gateway has looked by then, and restored what it knows

# What the caller found to be no document of ours counts as none, as long as it is still the same.
_WRITE = Script(
    """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then
    redis.call('DEL', KEYS[1])
end
local version, document, began = unpack(redis.call('HMGET', KEYS[1], 'version', 'document', 'began'))
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
began = tonumber(began or '')
if not began then
    redis.call('HSET', KEYS[1], 'began', string.format('%.0f', now))
    began = now
end
if ARGV[5] == 'change' and now - began >= 0 and now - began < tonumber(ARGV[6]) then
    return {'early', began + ARGV[6] - now}
end
local is_wrong = (version or '') == ARGV[3] and (document or '') == ARGV[4]
if not is_wrong and (tonumber(version or '') or 0) >= tonumber(ARGV[1]) then
    return {'conflict', 0}
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'document', ARGV[2])
return {'written', 0}
"""
)


class RedisStore:
    """A store in the shared Redis.

    Args:
        link: To Redis, for this object alone.
        check: Of every document that is read.
    """

    def __init__(self, link: Link, check: Check = check_nothing) -> None:
        self._link = link
        self._check = check
        self._wrong: dict[str, tuple[bytes, bytes]] = {}

    async def read(self, name: str) -> Stored | None:
        """The newest document; None where there is none, or something that nobody can read and a write replaces."""
        try:
            found = await self._ask(Command(None, ("HMGET", _KEY_PREFIX + name, "version", "document")))
        except BadKey:
            return None
        version, text = (part or b"" for part in found)
        try:
            stored = parse_stored(text, name, self._check) if version or text else None
            if stored is not None and version != b"%d" % stored.version:
                raise ValueError("its version is another one")
        except ValueError:
            self._warn(name, (version, text))
            return None
        self._wrong.pop(name, None)
        return stored

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        """As the protocol; into a store that came empty only when all had the time to restore what they know."""
        said, wait_ms = await self._write(name, document, version, "change")
        if said == b"early":
            await asyncio.sleep((wait_ms + 10) / 1000)  # our clock and Redis' may not run alike
            said, _ = await self._write(name, document, version, "change")
        if said != b"written":
            raise StateConflict

    async def restore(self, name: str, document: dict[str, Any], version: int) -> None:
        said, _ = await self._write(name, document, version, "restore")
        if said != b"written":
            raise StateConflict

    async def close(self) -> None:
        await self._link.close()

    async def _write(self, name: str, document: dict[str, Any], version: int, what: str) -> tuple[bytes, int]:
        await self.read(name)  # where that fails, nothing was changed for sure
        wrong = self._wrong.get(name, (b"", b""))
        text = format_stored(document, version)
        command = _WRITE.call([_KEY_PREFIX + name], [version, text, *wrong, what, _SETTLING_MS])
        try:
            [answer] = await self._link.ask([command], _TIMEOUT_S)
        except RedisAway as away:
            return await self._look_back(name, Stored(document, version), away)
        if isinstance(answer, RedisAway):
            raise StateAway(str(answer))
        return answer[0], answer[1]

    async def _look_back(self, name: str, ours: Stored, away: RedisAway) -> tuple[bytes, int]:
        """What became of a write of which nothing was heard. Raises `StateDoubtful`."""
        with suppress(StateAway):
            theirs = await self.read(name)
            if theirs == ours:
                return b"written", 0
            if theirs is not None and theirs.version >= ours.version:
                return b"conflict", 0
        raise StateDoubtful(str(away))

    def _warn(self, name: str, wrong: tuple[bytes, bytes]) -> None:
        if self._wrong.get(name) != wrong:
            _LOGGER.warning("the shared state %s is no document of ours; the next change replaces it", name)
        self._wrong[name] = wrong

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
    would be lost. The document of the highest version is the truth, wherever it is found; of two different ones of
    the same version, the shared one.

    Args:
        shared: What all gateways write to.
        copy: This gateway's own.
    """

    def __init__(self, shared: SharedStore, copy: StateStore) -> None:
        self._shared = shared
        self._copy = copy
        self._newest: dict[str, Stored | None] = {}

    async def read(self, name: str) -> Stored | None:
        if name not in self._newest:
            self._newest[name] = await self._read_copy(name)
        try:
            theirs = await self._shared.read(name)
        except StateAway:
            return self._newest[name]
        ours = self._newest[name]
        if theirs is not None and (ours is None or theirs.version > ours.version):
            await self._keep(name, theirs)
        elif ours is not None and (theirs is None or theirs.version < ours.version):
            with suppress(StateAway, StateConflict):  # the shared store forgot: a restart without its memory
                await self._shared.restore(name, ours.document, ours.version)
        elif theirs is not None and theirs != ours:
            await self._settle(name, theirs)
        return self._newest[name]

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        await self._shared.write(name, document, version)
        await self._keep(name, Stored(document, version))

    async def close(self) -> None:
        await self._shared.close()
        await self._copy.close()

    async def _read_copy(self, name: str) -> Stored | None:
        try:
            return await self._copy.read(name)
        except (OSError, StateUnreadable) as error:
            _LOGGER.warning("the copy of the state %s is of no use: %s", name, error)
            return None

    async def _settle(self, name: str, theirs: Stored) -> None:
        """Two documents have one version: a higher one of the shared document has all copies follow."""
        self._newest[name] = theirs
        settled = Stored(theirs.document, theirs.version + 1)
        with suppress(StateAway, StateConflict):  # another gateway was quicker; else the next start tries again
            await self._shared.restore(name, *settled)
            await self._keep(name, settled)

    async def _keep(self, name: str, stored: Stored) -> None:
        """Copy what is in force already, as well as the disk allows."""
        self._newest[name] = stored
        try:
            with suppress(StateConflict):  # another worker of this gateway was quicker
                await self._copy.write(name, stored.document, stored.version)
        except (OSError, StateUnreadable) as error:
            _LOGGER.warning("no copy of the state %s was kept: %s", name, error)
