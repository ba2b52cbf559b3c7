"""Small files: changed by one process at a time, in one step, and read only where nobody else may do with them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_TIMEOUT_S = 2.0
_TRY_PERIOD_S = 0.01


@contextmanager
def locked(path: Path, *, make: bool = False, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Keep other processes out of the block; who is killed inside leaves no lock behind.

    Args:
        path: A folder or a file.
        make: Make it where it is missing: a file of mode 0600.
        timeout_s: Most seconds to wait for another process.

    Raises:
        OSError: It cannot be opened; `TimeoutError` where another process kept the lock for so long.
    """
    flags = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, path, time.monotonic() + timeout_s)
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Put the content, with mode 0600, where the path was; a crash leaves the old file or the new one.

    Raises:
        OSError: The disk refused it; nothing is left beside the file.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        os.unlink(name)  # a full disk must not fill with what did not fit
        raise
    _sync_folder(path.parent)


def read_closed_file(path: Path, *, max_bytes: int, forbidden_mode: int) -> bytes:
    """The content of a file with which others may not do what they must not.

    Args:
        path: Of the file.
        max_bytes: Largest content.
        forbidden_mode: Permission bits that it must not have, 0o077 for a secret.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no plain file, too large, or has one of those bits.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode  # of the very file that is read, not of its name
        if not stat.S_ISREG(mode):
            raise ValueError("it is no plain file")
        if mode & forbidden_mode:
            raise ValueError(f"it is open to others; run: chmod {0o666 & ~forbidden_mode:o} {path}")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content


def _lock(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked", str(path))
        time.sleep(_TRY_PERIOD_S)


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a loss of power too; the content is there already."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
