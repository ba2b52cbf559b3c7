"""The rollout's shared state: a small document in a store, and the share that is read from it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

_DOCUMENT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_ROLLOUT = "rollout"


class StateUnreadable(Exception):
    """A stored document cannot be read; the message names the document and what to do."""


class StateStore(Protocol):
    """Keeps small JSON documents by name; a write is seen whole or not at all."""

    async def read(self, name: str) -> dict[str, Any] | None:
        """The document, or None where none was written. Raises `StateUnreadable`."""

    async def write(self, name: str, document: dict[str, Any]) -> None:
        """Replace the document; when this returns it has outlived the process, as far as the store outlives it."""


class MemoryStore:
    """A store for tests: documents are gone with the process."""

    def __init__(self) -> None:
        self._documents: dict[str, str] = {}

    async def read(self, name: str) -> dict[str, Any] | None:
        text = self._documents.get(name)
        return None if text is None else json.loads(text)

    async def write(self, name: str, document: dict[str, Any]) -> None:
        self._documents[name] = json.dumps(document)


class FileStore:
    """One file per document in a folder of the gateway's own; for a single gateway with a single worker.

    Args:
        directory: Created with mode 0700 where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory

    async def read(self, name: str) -> dict[str, Any] | None:
        return await asyncio.to_thread(self._read, self._path(name))

    async def write(self, name: str, document: dict[str, Any]) -> None:
        await asyncio.to_thread(self._write, self._path(name), json.dumps(document, indent=1))

    def _path(self, name: str) -> Path:
        if not _DOCUMENT_NAME.fullmatch(name):
            raise ValueError(f"not a document name: {name!r}")
        return self._directory / f"{name}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise StateUnreadable(f"{path} holds no JSON document; mend it, or delete it to start from the settings")
        return document

    @staticmethod
    def _write(path: Path, text: str) -> None:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError:
            os.unlink(name)  # a full disk must not fill with what did not fit
            raise


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


class Rollout:
    """The share in force: read from memory on the request path, written through to the store.

    Args:
        store: Where the share outlives the process.
        initial_fraction: Share to start with where the store holds none, 0..1.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self, store: StateStore, *, initial_fraction: float, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self._share = Share(initial_fraction, wall_clock(), "settings")
        self._writing = asyncio.Lock()

    async def load(self) -> None:
        """Take over what the store holds. Raises `StateUnreadable`."""
        document = await self._store.read(_ROLLOUT)
        if document is None:
            return
        try:
            self._share = Share(**document)
        except (TypeError, ValueError) as error:
            raise StateUnreadable("the stored rollout is no valid share; set it anew or delete it") from error

    def fraction(self) -> float:
        """The share of callers that Ray Serve answers now, 0..1."""
        return self._share.ray_serve_fraction

    def document(self) -> dict[str, Any]:
        """The share in force as a JSON-ready document."""
        return asdict(self._share)

    async def set_fraction(self, fraction: float, actor: str) -> dict[str, Any]:
        """Change the share and return the new document.

        The store is written first: a share that the disk refused is not in force, and the caller is told.

        Args:
            fraction: New share, 0..1.
            actor: Subject of who asked for it.

        Raises:
            ValueError: `fraction` is no share.
            OSError: The store could not be written.
        """
        share = Share(fraction, self._wall_clock(), actor)
        async with self._writing:
            await self._store.write(_ROLLOUT, asdict(share))
            self._share = share
        return self.document()
