"""The table of API keys on disk: changed under a lock and replaced in one step, followed by every gateway that runs."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.auth.api_keys import MAX_KEYS, MAX_TABLE_BYTES, ApiKey, ApiKeys, ApiKeysRefused, read_table, write_table
from app.auth.file_source import POLL_S
from app.auth.reload import Background, Outcome, SourceRecord
from app.auth.watched_file import WatchedFile
from app.files import locked, read_closed_file, replace_file
from app.secret_files import write_once

_MAX_PEPPER_BYTES = 1024
_MIN_PEPPER_BYTES = 32
_CLOSED = 0o077


class ApiKeyFile:
    """The stored table and the pepper of its digests, both closed to everybody but their owner.

    Args:
        path: Of the table. Gateways that share it must share the pepper too.
        pepper_path: Of the pepper; made with 48 random bytes when the first key is.
    """

    def __init__(self, path: Path, pepper_path: Path) -> None:
        self.path = path
        self._pepper_path = pepper_path

    def read(self) -> ApiKeys:
        """All keys; none where there is no table.

        Raises:
            OSError: Table or pepper cannot be read.
            ValueError: One of them is open to others or damaged.
        """
        try:
            text = _closed_file(self.path, MAX_TABLE_BYTES)
        except FileNotFoundError:
            return ApiKeys({}, b"")
        return self.parse(text)

    def parse(self, text: bytes) -> ApiKeys:
        """The keys of a table's text. Raises as `read` does."""
        return read_table(text, self._pepper())

    def add(self, make: Callable[[bytes], tuple[str, ApiKey]]) -> str:
        """Store one more key and give it, for the only time that anybody can.

        Args:
            make: Given the pepper, makes the key and what is stored of it, as `make_key` does.

        Raises:
            OSError, ValueError: As `read`; or there are too many keys.
        """
        with self._locked():
            known = self.read()
            if len(known.keys) >= MAX_KEYS:
                raise ApiKeysRefused(f"there are {MAX_KEYS} API keys already; revoke some")
            pepper = known.pepper or self._made_pepper()
            credential, key = make(pepper)
            if key.id in known.keys:
                raise ApiKeysRefused("the new key's id is taken by chance; run the command again")
            self._write([*known.keys.values(), key], pepper)
            return credential

    def remove(self, key_id: str) -> bool:
        """Strike one key from the table; False where there is none of that id. Raises as `read` does."""
        with self._locked():
            known = self.read()
            if key_id not in known.keys:
                return False
            self._write([key for key in known.keys.values() if key.id != key_id], known.pepper)
            return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other commands out; who is killed inside leaves the old table and no lock behind."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.path.with_name(f".{self.path.name}.lock"), make=True):
            yield

    def _write(self, keys: list[ApiKey], pepper: bytes) -> None:
        replace_file(self.path, write_table(keys, pepper))

    def _made_pepper(self) -> bytes:
        try:
            return self._pepper()
        except FileNotFoundError:
            write_once(self._pepper_path, secrets.token_urlsafe(48).encode())
            return self._pepper()

    def _pepper(self) -> bytes:
        pepper = _closed_file(self._pepper_path, _MAX_PEPPER_BYTES).rstrip(b"\r\n")
        if len(pepper) < _MIN_PEPPER_BYTES:
            raise ApiKeysRefused(f"the pepper in {self._pepper_path} must have at least {_MIN_PEPPER_BYTES} bytes")
        return pepper


class ApiKeyReloader:
    """Follows the table, four looks a second; a damaged one leaves the last good one in force.

    Args:
        file: The table.
        take: Told every new table.
        count: Told every outcome, for the metrics.
    """

    def __init__(
        self,
        file: ApiKeyFile,
        take: Callable[[ApiKeys], None],
        count: Callable[[str, Outcome, int], None],
    ) -> None:
        self.path = file.path
        self._file = file
        self._watched = WatchedFile(file.path, max_bytes=MAX_TABLE_BYTES, forbidden_mode=_CLOSED)
        self._take = take
        self._record = SourceRecord("api_keys", count)
        self._background = Background(self._run)

    def load(self) -> None:
        """Read the table for the first time; there may be none yet.

        Raises:
            OSError, ValueError: Table or pepper cannot be read, are open to others or damaged.
        """
        self._put(self._look())

    def note_fault(self, fault: str) -> None:
        """Say that what should be in force is not there yet; the table is looked at all the same."""
        self._record.refuse(fault)

    async def start(self) -> None:
        self._background.start()

    async def stop(self) -> None:
        await self._background.stop()

    def document(self) -> dict[str, Any]:
        """For `/stats`."""
        return self._record.document()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self._put(await asyncio.to_thread(self._look))
            except (OSError, ValueError) as error:
                self._record.refuse(str(error))

    def _look(self) -> ApiKeys | None:
        try:
            text = self._watched.look()
        except FileNotFoundError:
            if self._record.generation:
                raise  # a table is replaced, never taken away: whoever did that may have meant something else
            return None
        try:
            return None if text is None else self._file.parse(text)
        except (OSError, ValueError):
            self._watched.forget()  # the pepper may be what has to be mended
            raise

    def _put(self, known: ApiKeys | None) -> None:
        if known is not None:
            self._take(known)
            self._record.take(len(known.keys))


def _closed_file(path: Path, max_bytes: int) -> bytes:
    return read_closed_file(path, max_bytes=max_bytes, forbidden_mode=_CLOSED)
