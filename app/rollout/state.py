"""The rollout's shared state: a small document in a store, and the share that is read from it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from app.files import locked, replace_file

_LOGGER = logging.getLogger(__name__)

_DOCUMENT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_ROLLOUT = "rollout"
_MAX_VERSION = 1 << 50  # whole in every JSON and Lua; nobody gets there by counting

Check = Callable[[dict[str, Any]], object]  # raises ValueError for a document that is none of ours


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

    def __init__(self, directory: Path, check: Check = lambda document: None) -> None:
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
        return parse_stored(path.read_bytes(), check)
    except FileNotFoundError:
        return None
    except ValueError:
        advice = "mend it, or delete it to start from the settings"
        raise StateUnreadable(f"{path} holds no JSON document of ours; {advice}") from None


def parse_stored(text: bytes, check: Check) -> Stored:
    """A document with its version beside its own fields; without one it is of the first. Raises `ValueError`."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("not a stored document") from None
    version = document.pop("version", 1) if isinstance(document, dict) else None
    if type(version) is not int or not 1 <= version <= _MAX_VERSION:  # a bool is an int to isinstance
        raise ValueError("not a stored document")
    check(document)
    return Stored(document, version)


def format_stored(document: dict[str, Any], version: int) -> str:
    """The text that `parse_stored` reads."""
    return json.dumps({**document, "version": version}, indent=1)


@dataclass(frozen=True, slots=True)
class Share:
    """The canary's share, and who set it when.

    Attributes:
        ray_serve_fraction: Share of callers whom Ray Serve answers, 0..1.
        changed_at: Seconds since the epoch, by the wall clock.
        changed_by: Subject of the operator, or `settings` for the first value.
    """

    ray_serve_fraction: float
    changed_at: float
    changed_by: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.ray_serve_fraction <= 1.0:  # false for NaN too
            raise ValueError("ray_serve_fraction must be from 0 to 1")


def share_of(document: dict[str, Any]) -> Share:
    """The share that a document holds, with nothing beside it. Raises `ValueError`."""
    match document:
        case {
            "ray_serve_fraction": int() | float() as fraction,
            "changed_at": int() | float() as at,
            "changed_by": str(by),
        } if len(document) == 3 and not isinstance(fraction, bool) and math.isfinite(at):
            return Share(fraction, at, by)
    raise ValueError("not a stored share")


class Rollout:
    """The share in force: read from memory on the request path, written through to the store, and read from it again.

    Args:
        store: Where the share outlives the process.
        initial_fraction: Share to start with where the store holds none, 0..1.
        wall_clock: Seconds since the epoch.
        refresh_period_s: Seconds between looks at a store that others write to; None for one that is ours alone.
    """

    def __init__(
        self,
        store: StateStore,
        *,
        initial_fraction: float,
        wall_clock: Callable[[], float] = time.time,
        refresh_period_s: float | None = None,
    ) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self._refresh_period_s = refresh_period_s
        self._share = Share(initial_fraction, wall_clock(), "settings")
        self._version = 0
        self._writing = asyncio.Lock()
        self._refresher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what the store holds, and then whatever others write. Raises `StateUnreadable`."""
        await self.load()
        if self._refresh_period_s is not None:
            self._refresher = asyncio.create_task(self._refresh(self._refresh_period_s))

    async def stop(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        await self._store.close()

    async def load(self) -> None:
        """Take over what the store holds, unless that is older. Raises `StateUnreadable`, `StateAway`."""
        stored = await self._store.read(_ROLLOUT)
        if stored is None or stored.version < self._version:
            return
        try:
            self._share = share_of(stored.document)
        except ValueError as error:
            raise StateUnreadable("the stored rollout is no valid share; set it anew or delete it") from error
        self._version = stored.version

    def fraction(self) -> float:
        """The share of callers that Ray Serve answers now, 0..1."""
        return self._share.ray_serve_fraction

    def document(self) -> dict[str, Any]:
        """The share in force as a JSON-ready document."""
        return asdict(self._share)

    async def set_fraction(self, fraction: float, actor: str) -> dict[str, Any]:
        """Change the share and return the new document.

        The store is written first: a share that the disk or Redis refused is not in force, and the caller is told.

        Args:
            fraction: New share, 0..1.
            actor: Subject of who asked for it.

        Raises:
            ValueError: `fraction` is no share.
            StateAway: The store cannot be reached, or `StateDoubtful`: it was lost meanwhile.
            StateConflict: Others set it at the same time, and twice.
            StateUnreadable, OSError: The store could not be read or written.
        """
        share = Share(fraction, self._wall_clock(), actor)
        async with self._writing:
            try:
                await self._write(share)
            except StateConflict:  # somebody else set it since we looked; the last word counts
                await self.load()
                await self._write(share)
        return asdict(share)

    async def _write(self, share: Share) -> None:
        version = self._version + 1
        await self._store.write(_ROLLOUT, asdict(share), version)
        if version > self._version:  # what others wrote meanwhile may have been read already
            self._share, self._version = share, version

    async def _refresh(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.load()
            except (StateAway, StateUnreadable, OSError) as error:  # the share stays as it is
                _LOGGER.debug("the rollout's state was not read: %s", error)
