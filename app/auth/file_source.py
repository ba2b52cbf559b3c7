"""A file of which every new good version is taken over, and a bad one leaves the last good one in force."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, Generic, TypeVar

from app.auth.reload import Background, SourceRecord
from app.auth.watched_file import WatchedFile

POLL_S = 0.25
RENEWAL_PATIENCE_S = 0.5

T = TypeVar("T", bound=Sized)


class FileSource(Generic[T]):
    """A file that is looked at four times a second, beside the requests.

    Args:
        file: The file.
        read: What its text says; raises `ValueError`.
        take: Told every new version.
        record: Told every outcome.
    """

    def __init__(
        self, file: WatchedFile, read: Callable[[bytes], T], take: Callable[[T], None], record: SourceRecord
    ) -> None:
        self.path: Path = file.path
        self._file = file
        self._read = read
        self._take = take
        self._record = record
        self._background = Background(self._run)
        self._looking = asyncio.Lock()
        self._looks = 0

    def load(self) -> None:
        """Read the file for the first time.

        Raises:
            OSError, ValueError: It cannot be read, is open to others, or says nothing good.
        """
        self._put(self._look())

    def note_fault(self, fault: str) -> None:
        """Say that what should be in force is not there yet; the file is looked at all the same."""
        self._record.refuse(fault)

    async def start(self) -> None:
        self._background.start()

    async def stop(self) -> None:
        await self._background.stop()

    async def renew(self) -> bool:
        """Look at the file now; whether that has brought something new.

        A look that takes too long goes on without the asker: what it finds must not be lost with it.
        """
        before = self._record.generation
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENEWAL_PATIENCE_S):
                await asyncio.shield(self._look_once())
        return self._record.generation != before

    def document(self) -> dict[str, Any]:
        """For `/stats`."""
        return {"source": "file", **self._record.document()}

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._look_once()

    async def _look_once(self) -> None:
        """Look at the file; who comes while one looks shares the next look, and no more of them queue than that."""
        looks = self._looks
        async with self._looking:
            if self._looks > looks:
                return  # it began after we came
            self._looks += 1
            try:
                self._put(await asyncio.to_thread(self._look))
            except (OSError, ValueError) as error:
                self._record.refuse(f"the file cannot be used: {error}")

    def _look(self) -> T | None:
        text = self._file.look()
        return None if text is None else self._read(text)

    def _put(self, known: T | None) -> None:
        if known is not None:
            self._take(known)
            self._record.take(len(known))
