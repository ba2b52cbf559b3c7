"""Who changed what, when and why: a file of JSON lines in which every line vouches for the one before it.

A line is a record as JSON and, as its last member, the SHA-256 of those very bytes; the record holds the hash of the
line before. So no byte can be changed, and no line be taken out, put in or moved, without every later hash being
another one. Only the end can be cut off unnoticed: that is what the head is told to others for, as a metric.

What a crash leaves of a line that was being written is never continued. The next change ends it, and records how long
it was and its hash, so that what is left of it is vouched for too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO, FileIO
from pathlib import Path
from typing import IO, Any, Literal, get_args

import orjson

from app.files import locked

_LOGGER = logging.getLogger(__name__)

# `seen` is what another gateway did and came into force here, `abandoned` a change that was recorded and then could not
# be made, `doubtful` one of which the store did not say whether it was, `gap` tells of changes that could not be
# recorded, `torn` of what a crash left of a line.
Action = Literal[
    "start",
    "step",
    "promote",
    "pause",
    "resume",
    "rollback",
    "finish",
    "share",
    "override",
    "kill",
    "lift",
    "seen",
    "abandoned",
    "doubtful",
    "gap",
    "torn",
]
ACTIONS: frozenset[str] = frozenset(get_args(Action))

MAX_RECORD_BYTES = 16_384
_MAX_TEXT_CHARS = 256
_MAX_KEYS = 1000  # a change is known again among so many
_FIRST = "0" * 64
_SEAL_BYTES = len(b',"hash":""}') + 64
_MAX_REST_BYTES = 4 * MAX_RECORD_BYTES  # of what a crash leaves: a write may have been of three lines
_LOOK_PERIOD_S = 1.0
_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY


class AuditRefused(Exception):
    """A change could not be recorded; the message says why in one line."""


class ChainBroken(Exception):
    """The file is not what was written.

    Args:
        line: Number of the first line that is wrong, from 1.
        fault: What is wrong with it.
    """

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(f"line {line}: {fault}")
        self.line = line
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be recorded.

    Attributes:
        who: Subject of who asked for it, or the part of the gateway that did it by itself.
        action: What was done.
        before: JSON-ready, what was in force.
        after: JSON-ready, what is in force from now on.
        why: The reason that was given, or that the gateway found; 256 characters are kept, as of `who`.
        evidence: JSON-ready, what the decision was made by; left out where it makes the record too long.
        once: Names the change where several workers may tell of it. That it was `seen` is recorded once among the last
            thousand, and not where who made it was quicker; who made it records it in any case, with its evidence.
    """

    who: str
    action: Action
    before: Any = None
    after: Any = None
    why: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    once: str | None = None

    @property
    def is_hearsay(self) -> bool:
        """Whether it was made elsewhere, and only seen here."""
        return self.action == "seen"


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain.

    Attributes:
        records: How many there are.
        hash: Of the last one, 64 hex digits; zeros where there is none.
    """

    records: int = 0
    hash: str = _FIRST

    @property
    def number(self) -> int:
        """The first 52 bits of the hash, which a float holds exactly, as metrics are."""
        return int(self.hash[:13], 16)

    def is_meant_by(self, text: str) -> bool:
        """Whether the text is the hash, or the number as Prometheus writes it (`1.234e+15`)."""
        if text.lower() == self.hash:
            return True
        try:
            return float(text) == self.number
        except ValueError:
            return False


@dataclass(slots=True)
class _Chain:
    """What was read of a file, up to the end of its last whole record."""

    head: Head = field(default_factory=Head)
    size_bytes: int = 0
    lines: int = 0
    keys: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def copy(self) -> _Chain:
        return _Chain(self.head, self.size_bytes, self.lines, self.keys.copy())

    def take(self, record: Mapping[str, Any], text: bytes, n_lines: int, size_bytes: int) -> None:
        self.head = Head(record["n"], text[-66:-2].decode())
        self.size_bytes += size_bytes
        self.lines += n_lines
        if (key := record.get("once")) is not None:
            self.keys[key] = None
            if len(self.keys) > _MAX_KEYS:
                self.keys.popitem(last=False)


def verify(path: Path, head: str | None = None) -> Head:
    """Read a whole chain.

    Args:
        path: Of the file.
        head: What was once told of its end, `Head.hash` or `Head.number`; some record must have it.

    Returns:
        Its end.

    Raises:
        ChainBroken: Something was changed, is missing or torn, or no record has the head.
        OSError: The file cannot be read.
    """
    chain = _Chain()
    is_found = head is None or chain.head.is_meant_by(head)
    with path.open("rb") as file:
        for end in _read(file, chain):
            is_found = is_found or (head is not None and end.is_meant_by(head))
        if chain.size_bytes != file.tell():
            raise ChainBroken(chain.lines + 1, "it is torn: a crash cut it short; the next change will say so")
    if not is_found:
        raise ChainBroken(chain.lines + 1, f"the file ends here, after {chain.head.records} records, without that head")
    return chain.head


def _read(file: IO[bytes], chain: _Chain) -> Iterator[Head]:
    """Go on from where the chain ends; what is no whole record at the very end is left for a `torn` record to name.

    Raises:
        ChainBroken: What follows is not what was written.
    """
    file.seek(chain.size_bytes)
    unnamed = b""
    n_lines = 0
    fault = ""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        n_lines += 1
        record, its_fault = _record_of(line, chain.head)
        if record is not None and _names(record, unnamed):
            chain.take(record, line[:-1], n_lines, len(unnamed) + len(line))
            yield chain.head
            unnamed, n_lines, fault = b"", 0, ""
            continue
        unnamed += line
        fault = fault or its_fault
        if len(unnamed) > _MAX_REST_BYTES:
            break
    if unnamed.endswith(b"\n") or len(unnamed) > _MAX_REST_BYTES:
        raise ChainBroken(chain.lines + 1, fault or "it is followed by lines that nothing vouches for")


def _record_of(line: bytes, head: Head) -> tuple[dict[str, Any] | None, str]:
    """The record that a line holds where it is the next one, or what is wrong with it."""
    text = line[:-1]
    if not line.endswith(b"\n"):
        return None, "it has no end"
    if text != _seal(text[:-_SEAL_BYTES] + b"}"):
        return None, "it was changed: it has another hash"
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None, "it is no record"
    if record.get("previous") != head.hash:
        return None, "it does not follow the line before: one was changed, taken out, put in or moved"
    if record.get("n") != head.records + 1:
        return None, "its number does not follow that of the line before"
    return record, ""


def _names(record: Mapping[str, Any], unnamed: bytes) -> bool:
    """Whether the record vouches for what stands before it and is none: nothing, or the rest of a torn line."""
    if not unnamed:
        return record.get("action") != "torn"
    return record.get("action") == "torn" and record.get("evidence") == _describe_torn(unnamed[:-1])


def _describe_torn(rest: bytes) -> dict[str, Any]:
    return {"size_bytes": len(rest), "sha256": hashlib.sha256(rest).hexdigest()}


class AuditLog:
    """One gateway's chain; its workers append to it one at a time, in the order in which they ask.

    A change that lets more through must not come into force without its record: `append` raises, and nothing was
    changed. What makes things safer, a rollback or a kill, must not wait for a disk: `note` never fails, and what it
    could not record is counted, logged, and told by a record of its own as soon as there can be one.

    Args:
        path: Of the file; its folder is there.
        wall_clock: Seconds since the epoch.
        on_head: Told the chain's end whenever it is another one, and every second.
        on_missed: Told of a change that was not recorded.
        show_broken: Told whether the file is not what was written.
    """

    def __init__(
        self,
        path: Path,
        *,
        wall_clock: Callable[[], float] = time.time,
        on_head: Callable[[Head], None] = lambda _: None,
        on_missed: Callable[[], None] = lambda: None,
        show_broken: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._wall_clock = wall_clock
        self._on_head = on_head
        self._on_missed = on_missed
        self._show_broken = show_broken
        self._chain = _Chain()
        self._missed: Counter[str] = Counter()
        self._missed_since = 0.0
        self._turn = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._look()
        self._looking = asyncio.create_task(self._keep_looking())

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._tell_missed()  # after the end nobody knows of them

    @property
    def head(self) -> Head:
        """The chain's end as this worker saw it last."""
        return self._chain.head

    async def append(self, change: Change) -> None:
        """Record a change; when this returns, the record is on the disk.

        Raises:
            AuditRefused: It is not recorded, so the change must not be made.
        """
        at = self._wall_clock()
        async with self._turn:
            await self._in_thread(self._append, change, at)

    async def note(self, change: Change) -> None:
        """Record a change that is made whatever the disk says."""
        at = self._wall_clock()
        async with self._turn:
            try:
                await self._in_thread(self._append, change, at)
            except AuditRefused as refused:
                _LOGGER.error("not recorded: %s by %s: %s", change.action, change.who, refused)
                self._missed_since = self._missed_since if self._missed else at
                self._missed[change.action] += 1
                self._on_missed()

    async def _in_thread(self, work: Callable[..., None], *args: Any) -> None:
        """Do it whole even where nobody waits for it any more: half of it would be a chain of our own making."""
        task: Awaitable[None] = asyncio.ensure_future(asyncio.to_thread(work, *args))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            with suppress(AuditRefused):
                await task
            raise
        self._on_head(self._chain.head)

    def _append(self, change: Change | None, at: float) -> None:
        """Write the change, or without one only what was missed. Raises `AuditRefused`."""
        try:
            with locked(self._path, make=True), self._path.open("r+b", buffering=0) as file:
                rest = self._catch_up(file)
                if rest and self._is_whole(rest):
                    file.write(b"\n")
                    rest = self._catch_up(file)
                if change is None or not self._is_known(change):
                    self._write(file, rest, [] if change is None else [change], at)
        except ChainBroken as broken:
            raise AuditRefused(f"{self._path} is not what was written: {broken}; move it away and start anew") from None
        except OSError as error:
            raise AuditRefused(f"{self._path}: {error.strerror}") from None

    def _is_known(self, change: Change) -> bool:
        return change.is_hearsay and change.once is not None and _text(change.once) in self._chain.keys

    def _catch_up(self, file: FileIO) -> bytes:
        """Read what other workers wrote, and give what a crash left of a line."""
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes < self._chain.size_bytes:
            self._show_broken(True)
            raise ChainBroken(self._chain.lines, "it is gone: the file is shorter than it was")
        try:
            with open(os.dup(file.fileno()), "rb") as whole:  # with a buffer: line by line, not byte by byte
                for _ in _read(whole, self._chain):
                    pass
        except ChainBroken:
            self._show_broken(True)
            raise
        self._show_broken(False)
        file.seek(self._chain.size_bytes)
        return bytes(file.read())

    def _is_whole(self, rest: bytes) -> bool:
        """Whether nothing but the line's end is missing, so that the line is a record and no rest of one."""
        trial = self._chain.copy()
        trial.size_bytes = 0
        with suppress(ChainBroken):
            for _ in _read(BytesIO(rest + b"\n"), trial):
                pass
        return trial.size_bytes == len(rest) + 1

    def _write(self, file: FileIO, rest: bytes, changes: list[Change], at: float) -> None:
        """Write their records, and before them those that tell of a torn line and of changes that were missed."""
        if self._missed:
            gap = {"changes": dict(self._missed), "since": self._missed_since}
            changes = [Change("audit", "gap", why="they could not be recorded", evidence=gap), *changes]
        if rest:
            torn = Change("audit", "torn", why="a crash cut it short", evidence=_describe_torn(rest))
            changes = [torn, *changes]
        chain = self._chain.copy()
        text = b""
        for one in changes:
            line = _format(one, at, chain.head)
            chain.take({"n": chain.head.records + 1, "once": one.once and _text(one.once)}, line, 1, len(line) + 1)
            text += line + b"\n"
        start = self._chain.size_bytes + len(rest)
        text = b"\n" + text if rest else text
        _write_whole(file, text, start)
        chain.size_bytes = start + len(text)
        chain.lines += rest.count(b"\n") + bool(rest)
        self._chain = chain
        self._missed.clear()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_PERIOD_S)
            await self._look()

    async def _look(self) -> None:
        """Tell the end of the chain, which another worker may have moved."""
        with suppress(AuditRefused):
            async with self._turn:
                await self._in_thread(self._read_on)
        await self._tell_missed()

    async def _tell_missed(self) -> None:
        """Record that changes were missed, where the disk takes that now; else the next look tries again."""
        with suppress(AuditRefused):
            async with self._turn:
                if self._missed:
                    await self._in_thread(self._append, None, self._wall_clock())

    def _read_on(self) -> None:
        try:
            with locked(self._path), self._path.open("rb", buffering=0) as file:
                self._catch_up(file)
        except FileNotFoundError:
            if self._chain.head.records:
                self._show_broken(True)
        except (OSError, ChainBroken) as error:
            raise AuditRefused(str(error)) from None


def _write_whole(file: FileIO, text: bytes, start: int) -> None:
    """Write it to the disk, or leave the file as it was. Raises `OSError`."""
    try:
        left = memoryview(text)
        file.seek(start)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # else the next change finds the rest of it
            file.truncate(start)
        raise


def _format(change: Change, at: float, head: Head) -> bytes:
    """The record as a line without its end."""
    record = {
        "n": head.records + 1,
        "previous": head.hash,
        "at": at,
        "who": _text(change.who),
        "action": change.action,
        "from": change.before,
        "to": change.after,
        "why": _text(change.why),
        "evidence": change.evidence,
    }
    if change.once is not None:
        record["once"] = _text(change.once)
    text = _dump(record)
    if text is None or len(text) > MAX_RECORD_BYTES - 100:
        # Too long, or no JSON: that must not keep a rollback from being recorded.
        text = _dump({**record, "from": None, "to": None, "evidence": {"left_out": len(text or b"")}})
    assert text is not None, "texts and numbers alone"
    return _seal(text)


def _seal(text: bytes) -> bytes:
    """The object with its own hash as its last member."""
    return text[:-1] + b',"hash":"' + hashlib.sha256(text).hexdigest().encode() + b'"}'


def _dump(record: Mapping[str, Any]) -> bytes | None:
    try:
        return orjson.dumps(record, option=_OPTIONS)
    except TypeError:  # orjson's own error is one
        return None


def _text(text: str) -> str:
    return text[:_MAX_TEXT_CHARS].encode("utf-8", "replace").decode()
