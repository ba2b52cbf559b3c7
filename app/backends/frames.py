"""The frames between the gateway and its bridge process, over one socket pair.

    2 bytes   magic
    1 byte    kind
    1 byte    zero
    u32       call id: answers carry the id of what they answer, pushed frames carry 0
    u32       bytes of the head
    u32       bytes of the payload
    head      JSON, its shape given by the kind
    payload   PREDICT: the windows as little-endian float32; RESULT: a packed `Prediction`, exactly as the replica made
              it; empty otherwise

Integers are little-endian: both ends run on one host.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple, cast

import orjson

from app.backends.coalesce import Group
from serve_app.contract import WINDOW_BYTES, Options

MAX_HEAD_BYTES = 1024 * 1024
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024

_MAGIC = b"sl"
_PREFIX = struct.Struct("<2sBxIII")


class Kind(IntEnum):
    PREDICT = 1  # gateway → bridge: answer this group
    CANCEL = 2  # gateway → bridge: nobody waits for that call any more
    STATS = 3  # gateway → bridge: gather the replicas' counters; the RESULT has them in its head
    STATUS = 4  # bridge → gateway: the cluster as seen now, pushed
    RESULT = 5  # bridge → gateway
    ERROR = 6  # bridge → gateway: code and detail of a `ServingError`


class FrameError(Exception):
    """The bytes are no frame of ours, or end inside one: the connection cannot go on."""


class Frame(NamedTuple):
    kind: Kind
    call_id: int
    head: dict[str, Any]
    payload: bytes


class Passenger(NamedTuple):
    """Whose windows travel in a group, in the order of the payload."""

    request_id: str
    principal: str
    trace: str | None
    n_windows: int


class Predict(NamedTuple):
    """Head of a PREDICT frame.

    Attributes:
        app: Serve application that shall answer.
        options: What was asked for.
        deadline: Seconds on CLOCK_MONOTONIC, which all processes of a host share.
        passengers: The calls in the group.
    """

    app: str
    options: Options
    deadline: float
    passengers: tuple[Passenger, ...]

    @classmethod
    def of_group(cls, app: str, group: Group) -> Predict:
        passengers = tuple(
            Passenger(part.call.request_id, part.call.principal, part.call.trace, len(part.windows))
            for part in group.parts
        )
        return cls(app, group.options, group.deadline, passengers)

    @classmethod
    def of_frame(cls, frame: Frame) -> Predict:
        """Read the head of a PREDICT frame.

        Raises:
            FrameError: A field is missing, or the payload has another number of windows than the passengers.
        """
        try:
            app, options, deadline, passengers = (frame.head[name] for name in cls._fields)
            predict = cls(app, Options(*options), deadline, tuple(Passenger(*passenger) for passenger in passengers))
        except (KeyError, TypeError) as error:
            raise FrameError("a PREDICT frame lacks a field") from error
        if len(frame.payload) != WINDOW_BYTES * sum(passenger.n_windows for passenger in predict.passengers):
            raise FrameError("a PREDICT frame has another number of windows than it says")
        return predict


class FrameConnection(asyncio.Protocol):
    """One end of the socket pair: sends frames, and hands over each that arrives.

    Args:
        on_frame: Takes each frame, in order of arrival.
        on_close: Told once, when the connection has ended, with the reason where it was not a plain end of file.
    """

    def __init__(self, on_frame: Callable[[Frame], None], on_close: Callable[[Exception | None], None]) -> None:
        self._on_frame = on_frame
        self._on_close = on_close
        self._buffer = bytearray()
        self._failure: Exception | None = None
        self._transport: asyncio.Transport | None = None
        self.is_clogged = False

    def send(self, kind: Kind, call_id: int = 0, head: dict[str, Any] | None = None, *payload: memoryview) -> None:
        """Write one frame; the payload's pieces go to the socket as they are, without being joined first.

        Frames for a connection that has closed are dropped: `on_close` has told.
        """
        if self._transport is None or self._transport.is_closing():
            return
        head_bytes = orjson.dumps(head or {}, default=tuple)  # named tuples are not JSON to orjson
        prefix = _PREFIX.pack(_MAGIC, kind, call_id, len(head_bytes), sum(piece.nbytes for piece in payload))
        self._transport.writelines([prefix + head_bytes, *payload])

    def send_predict(self, call_id: int, app: str, group: Group) -> None:
        windows = (part.windows.data.cast("B") for part in group.parts)
        self.send(Kind.PREDICT, call_id, Predict.of_group(app, group)._asdict(), *windows)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods alone
        self._transport.set_write_buffer_limits(high=MAX_PAYLOAD_BYTES)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            for frame in self._split():
                self._on_frame(frame)
        except FrameError as error:
            self._failure = error
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._buffer and self._failure is None:
            self._failure = FrameError("the connection ended inside a frame")
        self._on_close(self._failure or exc)

    def pause_writing(self) -> None:
        self.is_clogged = True

    def resume_writing(self) -> None:
        self.is_clogged = False

    def _split(self) -> Iterator[Frame]:
        """Take the whole frames off the front of the buffer."""
        start = 0
        try:
            while len(self._buffer) - start >= _PREFIX.size:
                kind, call_id, head_bytes, payload_bytes = self._prefix_at(start)
                head_start = start + _PREFIX.size
                payload_start = head_start + head_bytes
                stop = payload_start + payload_bytes
                if len(self._buffer) < stop:
                    break
                with memoryview(self._buffer) as view:
                    head = _parse_head(view[head_start:payload_start])
                    payload = bytes(view[payload_start:stop])
                start = stop
                yield Frame(kind, call_id, head, payload)
        finally:
            del self._buffer[:start]

    def _prefix_at(self, start: int) -> tuple[Kind, int, int, int]:
        magic, kind, call_id, head_bytes, payload_bytes = _PREFIX.unpack_from(self._buffer, start)
        if magic != _MAGIC or kind not in Kind._value2member_map_:
            raise FrameError("these bytes are no frame")
        if head_bytes > MAX_HEAD_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise FrameError("a frame is larger than frames may be")
        return Kind(kind), call_id, head_bytes, payload_bytes


def _parse_head(head: memoryview) -> dict[str, Any]:
    try:
        parsed = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise FrameError("a frame's head is not JSON") from error
    if not isinstance(parsed, dict):
        raise FrameError("a frame's head is not an object")
    return parsed
