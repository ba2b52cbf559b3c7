"""Tokens that must not count though their time has not come: leaked ones, known by their `jti`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from app.auth.file_source import FileSource
from app.auth.principal import read_name
from app.auth.reload import Outcome, SourceRecord
from app.auth.strict_json import FOREVER, read_time
from app.auth.watched_file import WatchedFile

MAX_DENIED_BYTES = 1 << 20

Denied = Mapping[str, int]  # ids of tokens, and until when each is refused: seconds since the epoch


class DeniedFile(FileSource[Denied]):
    """A file of denied tokens; its group and others must not write to it.

    Args:
        path: Of the file.
        take: Told every new list.
        count: Told every outcome, for the metrics.
    """

    def __init__(self, path: Path, take: Callable[[Denied], None], count: Callable[[str, Outcome, int], None]) -> None:
        file = WatchedFile(path, max_bytes=MAX_DENIED_BYTES, forbidden_mode=0o022)
        super().__init__(file, read_denied, take, SourceRecord("denied", count))


def read_denied(text: bytes) -> Denied:
    """The tokens that a list denies.

    Args:
        text: A line for each: its `jti`, and where wanted, after a space, the second since the epoch from which on the
            line means nothing, such as the token's `exp` and a minute. Empty lines and those that begin with # are
            passed over.

    Raises:
        ValueError: A line says something else; the message tells which.
    """
    denied: dict[str, int] = {}
    for number, line in enumerate(text.decode("utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            token_id, until = words if len(words) > 1 else (words[0], None)
            denied[read_name(token_id)] = FOREVER if until is None else read_time(_integer(until))
        except ValueError:
            raise ValueError(f"line {number} must be a token's `jti`, and at most a time in seconds after it") from None
    return denied


def _integer(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(FOREVER)):
        raise ValueError("no number")
    return int(text)
