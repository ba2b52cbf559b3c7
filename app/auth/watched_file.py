"""A small file that others replace while we run."""

from __future__ import annotations

from pathlib import Path

from app.files import read_closed_file

Stamp = tuple[int, ...]


class WatchedFile:
    """Gives a file's content whenever that has changed.

    Times in a file system are coarse, so a file can change twice within one of its ticks. A change therefore counts
    as seen only once two looks in a row, apart by more than a tick, have found the same stamp.

    Args:
        path: Of the file; what it names may be replaced.
        max_bytes: Largest content.
        forbidden_mode: Permission bits that it must not have, 0o077 for a secret.
    """

    def __init__(self, path: Path, *, max_bytes: int, forbidden_mode: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._forbidden_mode = forbidden_mode
        self._seen: Stamp | None = None
        self._settled: Stamp | None = None
        self._content: bytes | None = None

    def look(self) -> bytes | None:
        """The content, or None where it is the same as at the last look that gave one.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be read.
            ValueError: It is no plain file, too large, or others may do with it what they must not.
        """
        try:
            stamp = _stamp(self.path)
            if stamp == self._settled:
                return None
            content = read_closed_file(self.path, max_bytes=self._max_bytes, forbidden_mode=self._forbidden_mode)
        except (OSError, ValueError):
            self.forget()  # once it is well again, that is a change
            raise
        self._settled = stamp if stamp == self._seen else None
        self._seen = stamp
        if content == self._content:
            return None
        self._content = content
        return content

    def forget(self) -> None:
        """Have the next look give the content whatever was seen before."""
        self._settled = self._content = None


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode
