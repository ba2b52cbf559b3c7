"""Secrets: which are good enough, and how they are kept in files that nobody else may open."""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from app.files import read_closed_file
from app.guessable import is_guessable

_MIN_SECRET_BYTES = 32
_MAX_FILE_BYTES = 64 << 10
_CLOSED = 0o077
_WEBHOOK_PREFIX = b"whsec_"  # as Standard Webhooks, version 1, writes them
_MIN_WEBHOOK_BYTES, _MAX_WEBHOOK_BYTES = 24, 64


def check_secret(secret: bytes, name: str) -> None:
    """Refuse a secret that could be guessed.

    Args:
        secret: Key of an HMAC.
        name: What the operator calls it, for the message.

    Raises:
        ValueError: Shorter than 32 bytes, a key of another kind, well known or with common words in it, a walk over the
            keyboard, a shorter text repeated, or with less than 3.5 bits of variety per byte or step between two. The
            message never holds the secret.
    """
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(f"{name} must have at least {_MIN_SECRET_BYTES} bytes; `openssl rand -base64 48` makes one")
    if secret.lstrip().startswith((b"-----BEGIN", b"ssh-")):
        raise ValueError(f"{name} is a public or private key; HS256 needs a random secret")
    if is_guessable(secret):
        raise ValueError(f"{name} is too easy to guess; `openssl rand -base64 48` makes a good one")


def read_webhook_secret(text: bytes) -> bytes:
    """The key in a secret of the form `whsec_` and 24 to 64 bytes in base64. Raises `ValueError`."""
    try:
        key = base64.b64decode(text.removeprefix(_WEBHOOK_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not text.startswith(_WEBHOOK_PREFIX) or not _MIN_WEBHOOK_BYTES <= len(key) <= _MAX_WEBHOOK_BYTES:
        raise ValueError(
            f"a webhook's secret is whsec_ and {_MIN_WEBHOOK_BYTES} to {_MAX_WEBHOOK_BYTES} random bytes in base64"
        )
    return key


def read_secret_file(path: Path) -> bytes:
    """Read a secret from a file that only its owner may read; a trailing line end is not part of it.

    Raises:
        ValueError: No such file, no plain or a large one, or one that its group or others may open.
    """
    try:
        secret = read_closed_file(path, max_bytes=_MAX_FILE_BYTES, forbidden_mode=_CLOSED)
    except OSError as error:
        raise ValueError(f"cannot read the secret file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the secret file {path}: {error}") from error
    return secret.rstrip(b"\r\n")


def write_once(path: Path, content: bytes) -> None:
    """Make a secret file, whole or not at all; one that is there stays as it is, whoever made it.

    Raises:
        OSError: It cannot be made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename, never in place of another
    finally:
        os.unlink(draft)


class SecretFile:
    """A secret that is read again when its file changes, so that it can be replaced under a running gateway.

    Called, it gives the secret, and raises `ValueError` as `read_secret_file` does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._secret = b""

    def __call__(self) -> bytes:
        stamp = self._look()  # before reading: a change in between is seen the next time
        if stamp != self._stamp:
            self._secret = read_secret_file(self._path)
            self._stamp = stamp
        return self._secret

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            self._stamp = None  # reading will say what is wrong
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
