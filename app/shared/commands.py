"""What Redis is asked, and how it fails; no library is needed to say so."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

Value = str | bytes | int


class RedisAway(Exception):
    """Redis did not do what was asked, for whatever reason; the message says of which kind and holds no secret."""


class BadKey(RedisAway):
    """What a key holds is none of what we write there."""


class Script:
    """A script of one text that Redis keeps by its hash.

    Args:
        text: In Lua.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._hash = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], args: Sequence[Value]) -> Command:
        """The command that runs it."""
        return Command(self, ("EVALSHA", self._hash, len(keys), *keys, *args))


class Command:
    """One command of a bundle.

    Args:
        script: The script that it runs, if it does.
        words: As Redis takes them.
    """

    __slots__ = ("script", "words")

    def __init__(self, script: Script | None, words: Sequence[Value]) -> None:
        self.script = script
        self.words = words

    def in_full(self) -> Command:
        """The same with the script's text, which Redis keeps from then on."""
        assert self.script is not None, "only scripts are asked for again"
        return Command(self.script, ("EVAL", self.script.text, *self.words[2:]))


class Link(Protocol):
    """Asks Redis for a bundle of commands at a time; see `app.shared.link`."""

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]: ...

    async def close(self) -> None: ...
