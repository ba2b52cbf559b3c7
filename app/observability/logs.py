"""Logs: one JSON object per line, ASCII, bounded fields, no secrets; written by a thread, never by the event loop."""

from __future__ import annotations

import json
import logging
import math
import re
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO, Any

# What several processes write to one pipe stays whole up to PIPE_BUF bytes (POSIX, write); one of them is left for the
# line's end that a torn line before it needs.
MAX_LINE_BYTES = select.PIPE_BUF - 1
_MAX_FIELD_CHARS = 256
_MAX_TRACE_CHARS = MAX_LINE_BYTES
_MAX_READ_CHARS = 2 * _MAX_TRACE_CHARS  # well over what is kept: what the cut makes of a secret is not kept
_MAX_WAITING_LINES = 10_000
_FLUSH_INTERVAL_S = 0.2

# Nothing is tried twice: runs that cannot be followed by what they hold are possessive, the others are short.
_SECRETS = re.compile(
    r"eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_.-]*)?"  # tokens, and what is left of one that was cut
    r"|gk_[A-Za-z0-9_-]+"  # API keys
    r"|-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,32}PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^\s/@:]*+:[^\s/@]++(?=@)"  # user and password of an URL
    r"|(?i:bearer)\s++[^\s\"',]+"
    r"|(?i:(?:secret|password|passwd|pepper|token|api_?key|sticky_key)\w{0,64}+[\"']?\s*+[=:]\s*+)[^\s,;]+",
    re.DOTALL,
)


def redact(text: str) -> str:
    """Replace whatever looks like a token, an API key or a named secret."""
    return _SECRETS.sub("[redacted]", text)


class LineWriter:
    """Takes lines from the event loop and writes them from a thread, many at a time.

    A reader that is slow or gone costs log lines, which are counted, and never a request.

    Args:
        stream: Where lines go, binary.
        on_drop: Told, from any thread, how many lines were just lost.
        max_waiting_lines: Lines to hold; beyond them lines are dropped.
        flush_interval_s: Seconds between writes.
    """

    def __init__(
        self,
        stream: IO[bytes],
        *,
        on_drop: Callable[[int], None] = lambda _: None,
        max_waiting_lines: int = _MAX_WAITING_LINES,
        flush_interval_s: float = _FLUSH_INTERVAL_S,
    ) -> None:
        self.dropped = 0
        # Below its buffer, which would keep what a full disk refused until the very end of the process.
        self._stream = getattr(stream, "raw", stream)
        self._on_drop = on_drop
        self._may_be_torn = False
        self._max_waiting_lines = max_waiting_lines
        self._flush_interval_s = flush_interval_s
        self._waiting: deque[bytes] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)

    def start(self) -> None:
        """Begin to write; lines queued before are written too."""
        self._thread.start()

    def write(self, fields: dict[str, Any]) -> None:
        """Queue one line of any fields; where they are too long for a line, their longest texts are cut."""
        self.write_line(_fitting_line(fields))

    def write_line(self, line: bytes) -> None:
        """Queue one line that is ASCII already; drops it when too many wait, or when it might tear."""
        if len(self._waiting) >= self._max_waiting_lines or len(line) > MAX_LINE_BYTES:
            self._drop(1)
        else:
            self._waiting.append(line)

    def close(self) -> None:
        """Write what waits and end the thread; waits two seconds for a stream that does not take it."""
        self._closing.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._closing.wait(self._flush_interval_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        left = len(self._waiting)
        while left:
            lines = self._take_lines(left)
            left -= len(lines)
            try:
                self._write_whole(b"\n" * self._may_be_torn + b"".join(lines))
                self._may_be_torn = False
            except (OSError, ValueError):  # a full disk, a closed pipe or file
                self._may_be_torn = True  # half a line may have left: the next one begins on a line of its own
                self._drop(len(lines))

    def _take_lines(self, most: int) -> list[bytes]:
        """As many as a pipe takes in one piece, among which no other worker writes."""
        lines = [self._waiting.popleft()]
        size_bytes = len(lines[0])
        while len(lines) < most and (size_bytes := size_bytes + len(self._waiting[0])) <= MAX_LINE_BYTES:
            lines.append(self._waiting.popleft())
        return lines

    def _write_whole(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = self._stream.write(left)
            if written is None:
                raise BlockingIOError("a pipe that takes nothing now")
            left = left[written:]
        self._stream.flush()

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._on_drop(count)


def _fitting_line(fields: dict[str, Any]) -> bytes:
    """The fields as a line, with the longest text cut until it fits: a trace at its beginning, others at their end."""
    line = _line(fields)
    while (excess := len(line) - MAX_LINE_BYTES) > 0:
        texts = {name: text for name, text in fields.items() if isinstance(text, str) and text}
        if not texts:
            break
        name, text = max(texts.items(), key=lambda item: len(item[1]))
        cut = math.ceil(
            excess * len(text) / len(json.dumps(text))
        )  # characters may be escaped: again, if it was little
        fields = {**fields, name: text[cut:] if name == "trace" else text[:-cut]}
        line = _line(fields)
    return line


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).replace("\x7f", "\\u007f").encode() + b"\n"


class JsonHandler(logging.Handler):
    """Sends the standard library's log records through a `LineWriter`."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(_fields_of(record))
        except Exception:  # a record that cannot be formatted must not fail the request that logged it
            self.handleError(record)


def timestamp() -> str:
    """Now by the wall clock, UTC, milliseconds, RFC 3339."""
    second, fraction = divmod(time.time(), 1)
    return f"{_second(second)}.{int(1000 * fraction):03d}+00:00"


@lru_cache(maxsize=2)
def _second(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# They speak of every request that goes out, and quote what the other side said.
_CHATTY = {"httpx": logging.WARNING, "httpcore": logging.WARNING}


@contextmanager
def logging_to(writer: LineWriter, level: str) -> Iterator[None]:
    """Send every log record of the process from `level` up (debug, info, warning, error) through the writer."""
    root = logging.getLogger()
    handler = JsonHandler(writer)
    levels: dict[str, int | str] = {"": level.upper(), **_CHATTY}
    levels_before = {name: logging.getLogger(name).level for name in levels}
    writer.start()
    root.addHandler(handler)
    _set_levels(levels)
    try:
        yield
    finally:
        _set_levels(levels_before)
        root.removeHandler(handler)
        writer.close()


def _set_levels(levels: Mapping[str, int | str]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "time": timestamp(),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": redact(record.getMessage()[:_MAX_READ_CHARS])[:_MAX_FIELD_CHARS],
    }
    request_id = getattr(record, "request_id", None)
    if request_id is not None:
        fields["request_id"] = str(request_id)[:_MAX_FIELD_CHARS]
    if record.exc_info:
        # The end of a trace says more than its beginning.
        trace = "".join(traceback.format_exception(*record.exc_info))
        fields["trace"] = redact(trace[-_MAX_READ_CHARS:])[-_MAX_TRACE_CHARS:]
    return fields
