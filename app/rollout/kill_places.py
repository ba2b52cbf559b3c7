"""Where kills are kept: a file that all workers of a gateway watch, and the Redis that all gateways share."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from app.files import locked, read_closed_file, replace_file
from app.rollout.kills import MAX_TABLE_BYTES, Entry, Kills, format_kills, parse_kills
from app.shared.commands import BadKey, Command, Link, RedisAway, Script

_LOGGER = logging.getLogger(__name__)

FILE_NAME = "kill.json"  # in the state folder
_LOCK_TIMEOUT_S = 0.5
_SPARE_BYTES = 256 << 10  # a table of a thousand usual entries
_WRITABLE_BY_OTHERS = 0o022

_REDIS_KEY = "sluice:kills"
_REDIS_TIMEOUT_S = 0.2


class KillsUnreadable(Exception):
    """The file holds no table of kills, or cannot be read; the message is one line, with what to do."""


class KillFile:
    """The table of one gateway, in a file that is replaced as a whole.

    Beside it lies a spare file of its size, whose room on the disk is taken already: on a disk that is full since, the
    table is written over the spare, which then takes the table's name.

    Args:
        path: Of the table; its folder is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spare = path.with_name(f".{path.name}.spare")
        self._seen: object = object()  # nothing yet; not b"" either, to which a file may be cut

    def look(self) -> Kills | None:
        """The table, empty where there is no file; None where it is the one that was found before.

        Raises:
            KillsUnreadable: It cannot be told what is killed.
        """
        content = self._read()
        if content == self._seen:
            return None
        kills = self._parsed(content)
        self._seen = content
        return kills

    def merge(self, kills: Kills, now_s: float, *, replace_unreadable: bool = True) -> tuple[Kills, list[Entry]]:
        """Put what the file lacks into it.

        Args:
            kills: What is known here.
            now_s: Seconds since the epoch.
            replace_unreadable: Put a file that nobody can read aside and go on from what is known here.

        Returns:
            The table that the file holds now, and the entries that it lacked.

        Raises:
            KillsUnreadable: The file cannot be read.
            OSError: The disk refused it.
        """
        with locked(self._path.parent, timeout_s=_LOCK_TIMEOUT_S):
            found = self._found(put_aside=replace_unreadable)
            lacked = kills.beyond(found or Kills())
            merged = (found or Kills()).merged(lacked, now_s)
            if lacked or found is None:
                self._write(format_kills(merged))
            return merged, lacked

    def keep_spare(self) -> None:
        """Take the room for the day on which there is none. Raises `OSError`."""
        if not self._spare.exists():
            replace_file(self._spare, b" " * _SPARE_BYTES)  # not zeros: some file systems would keep no room for them

    def _found(self, *, put_aside: bool) -> Kills | None:
        """The table in the file; None where there is none, or where one that nobody can read was put aside."""
        try:
            content = self._read()
            return None if content is None else self._parsed(content)
        except KillsUnreadable as unreadable:
            if not put_aside:
                raise
            _LOGGER.error("%s; it is put aside", unreadable)
            os.replace(self._path, self._path.with_name(f"{self._path.name}.unreadable"))
            return None

    def _read(self) -> bytes | None:
        try:
            return read_closed_file(self._path, max_bytes=MAX_TABLE_BYTES, forbidden_mode=_WRITABLE_BY_OTHERS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KillsUnreadable(f"{self._path}: {error.strerror}") from None
        except ValueError as error:
            raise KillsUnreadable(f"{self._path}: {error}") from None

    def _parsed(self, content: bytes | None) -> Kills:
        try:
            return Kills() if content is None else parse_kills(content)
        except ValueError as error:
            raise KillsUnreadable(
                f"{self._path} does not tell what is killed: {error}; mend it, or delete it if nothing is"
            ) from None

    def _write(self, content: bytes) -> None:
        try:
            replace_file(self._path, content)
        except OSError as error:
            if len(content) > _SPARE_BYTES or not self._spare.exists():
                raise
            _LOGGER.error("%s is kept in the room that was spared for it: %s", self._path, error.strerror)
            self._write_over_spare(content)

    def _write_over_spare(self, content: bytes) -> None:
        with self._spare.open("r+b") as file:
            file.write(content.ljust(_SPARE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._spare, self._path)


# A table is replaced only by who has read it: its stamp is drawn anew with every write.
_WRITE = Script(
    """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then
    redis.call('DEL', KEYS[1])
end
if (redis.call('HGET', KEYS[1], 'stamp') or '') ~= ARGV[1] then
    return 0
end
redis.call('HSET', KEYS[1], 'stamp', ARGV[2], 'table', ARGV[3])
return 1
"""
)


class Found(NamedTuple):
    """The table in Redis, and the stamp by which it is replaced."""

    stamp: bytes
    kills: Kills


class SharedKills:
    """The table that all gateways share.

    Args:
        link: To Redis, for this object alone.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._wrong = b""

    async def stamp(self) -> bytes:
        """What changes with the table; empty where there is none. Raises `RedisAway`."""
        return await self._ask(Command(None, ("HGET", _REDIS_KEY, "stamp"))) or b""

    async def read(self) -> Found:
        """The table; an empty one in place of what nobody can read. Raises `RedisAway`."""
        stamp, text = (part or b"" for part in await self._ask(Command(None, ("HMGET", _REDIS_KEY, "stamp", "table"))))
        try:
            return Found(stamp, parse_kills(text) if text else Kills())
        except ValueError as error:
            if text != self._wrong:
                _LOGGER.error("the shared table of kills is none, and replaced: %s", error)
            self._wrong = text
            return Found(stamp, Kills())

    async def write(self, kills: Kills, stamp: bytes) -> bytes | None:
        """Replace the table that was read with this stamp; the new stamp, None where another was quicker.

        Raises:
            RedisAway: It may have been replaced or not.
        """
        new = secrets.token_hex(8)
        is_written = await self._ask(_WRITE.call([_REDIS_KEY], [stamp, new, format_kills(kills)]))
        return new.encode() if is_written else None

    async def close(self) -> None:
        await self._link.close()

    async def _ask(self, command: Command) -> Any:
        [answer] = await self._link.ask([command], _REDIS_TIMEOUT_S)
        if isinstance(answer, BadKey):
            return [b"", b""] if command.words[0] == "HMGET" else b""
        if isinstance(answer, RedisAway):
            raise answer
        return answer
