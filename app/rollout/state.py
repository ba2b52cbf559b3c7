"""Small JSON documents that outlive a process, by name: the protocol of their stores, in memory and in files."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from app.files import locked, replace_file

_LOGGER = logging.getLogger(__name__)

_DOCUMENT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_MAX_VERSION = 1 << 50  # whole in every JSON and Lua; nobody gets there by counting

Check = Callable[[str, dict[str, Any]], object]  # of name and document; raises ValueError for one that is none of ours


def check_nothing(name: str, document: dict[str, Any]) -> None:
    """Takes every document for ours."""


class StateUnreadable(Exception):
    """A stored document cannot be read; the message names the document and what to do."""


class StateAway(Exception):
    """The store cannot be reached, so nothing was written."""


class StateDoubtful(StateAway):
    """The store was lost while it was written to, and it may have been."""


class StateConflict(Exception):
    """The store holds this version, or a later one, already; nothing was written."""


class Stored(NamedTuple):
    """A document as a store holds it.

    Attributes:
        document: JSON-ready.
        version: 1 for the first, and higher for each that follows.
    """

    document: dict[str, Any]
    version: int


class StateStore(Protocol):
    """Keeps small JSON documents by name; a write is seen whole or not at all.

    A write counts only where its version is higher than the stored one's. So whoever read version 7 and writes 8 has
    compared and set in one step: of two who do so at one time, one succeeds and the other is told.
    """

    async def read(self, name: str) -> Stored | None:
        """The newest document, or None where none was written. Raises `StateUnreadable`, `StateAway`."""

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        """Replace the document; when this returns it has outlived the process, as far as the store outlives it.

        Raises:
            StateConflict: The stored document is as new, or newer.
            StateAway: The store cannot be reached.
            StateDoubtful: It was lost meanwhile.
            OSError: The disk refused it.
        """

    async def close(self) -> None:
        """Give back what was opened on the way."""


class SharedStore(StateStore, Protocol):
    """A store of several gateways, which may forget everything and is then filled again by whoever has a copy."""

    async def restore(self, name: str, document: dict[str, Any], version: int) -> None:
        """As `write`, for what is in force already: a store that came empty takes it before any change."""


class MemoryStore:
    """A store for tests: documents are gone with the process."""

    def __init__(self) -> None:
        self._stored: dict[str, tuple[str, int]] = {}

    async def read(self, name: str) -> Stored | None:
        if name not in self._stored:
            return None
        text, version = self._stored[name]
        return Stored(json.loads(text), version)

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        if name in self._stored and self._stored[name][1] >= version:
            raise StateConflict
        self._stored[name] = json.dumps(document), version

    async def restore(self, name: str, document: dict[str, Any], version: int) -> None:
        await self.write(name, document, version)

    async def close(self) -> None: ...


class FileStore:
    """One file per document in a folder of the gateway's own, for all of its workers.

    Args:
        directory: Created with mode 0700 where it is missing.
        check: Of every document that is read.
    """

    def __init__(self, directory: Path, check: Check = check_nothing) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._check = check

    async def read(self, name: str) -> Stored | None:
        return await asyncio.to_thread(_read_file, self._path(name), self._check)

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        """As the protocol; a file that nobody can read is replaced."""
        await asyncio.to_thread(self._write, self._path(name), document, version)

    async def close(self) -> None: ...

    def _write(self, path: Path, document: dict[str, Any], version: int) -> None:
        with locked(path.parent):
            try:
                stored = _read_file(path, self._check) if path.is_file() else None
            except StateUnreadable as error:
                _LOGGER.warning("it is replaced: %s", error)
                stored = None
            if stored is not None and stored.version >= version:
                raise StateConflict
            replace_file(path, format_stored(document, version).encode())

    def _path(self, name: str) -> Path:
        if not _DOCUMENT_NAME.fullmatch(name):
            raise ValueError(f"not a document name: {name!r}")
        return self._directory / f"{name}.json"


def _read_file(path: Path, check: Check) -> Stored | None:
    try:
        return parse_stored(path.read_bytes(), path.stem, check)
    except FileNotFoundError:
        return None
    except ValueError:
        advice = "mend it, or delete it to start from the settings"
        raise StateUnreadable(f"{path} holds no JSON document of ours; {advice}") from None


def parse_stored(text: bytes, name: str, check: Check) -> Stored:
    """A document with its version beside its own fields; without one it is of the first. Raises `ValueError`."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("not a stored document") from None
    version = document.pop("version", 1) if isinstance(document, dict) else None
    if type(version) is not int or not 1 <= version <= _MAX_VERSION:  # a bool is an int to isinstance
        raise ValueError("not a stored document")
    check(name, document)
    return Stored(document, version)


def format_stored(document: dict[str, Any], version: int) -> str:
    """The text that `parse_stored` reads."""
    return json.dumps({**document, "version": version}, indent=1)
