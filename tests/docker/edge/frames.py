"""HTTP/2 frame by frame, for what no client library would send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

from tests.docker.edge.process import EdgeProcess

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD_BYTES = 9


class Http2:
    """One connection; streams are numbered by the caller's order.

    Args:
        edge: To connect to.
        source: Loopback address to come from.
        settings: What the client tells of itself, by number.
    """

    def __init__(self, edge: EdgeProcess, source: str = "127.0.0.1", settings: dict[int, int] | None = None) -> None:
        self._connection = edge.connect(source, "h2", timeout_s=5.0)
        self._encoder, self._decoder = Encoder(), Decoder()
        self._received = b""
        self._stream_id = -1
        self._is_silent = False
        self._connection.sendall(PREFACE + SettingsFrame(settings=settings or {}).serialize())

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def ask(self, headers: Sequence[tuple[str, str]], body: bytes = b"") -> int | None:
        """Send a request; returns the answer's status, None when its stream or the connection is ended instead."""
        stream_id = self.send(self.request(headers, body))
        for frame in self.frames():
            if isinstance(frame, GoAwayFrame) and frame.error_code:
                return None
            if frame.stream_id == stream_id and isinstance(frame, RstStreamFrame):
                return None
            if frame.stream_id == stream_id and isinstance(frame, HeadersFrame):
                return int(dict(self._decoder.decode(frame.data))[":status"])
        return None

    def request(self, headers: Sequence[tuple[str, str]], body: bytes = b"") -> list[Frame]:
        """Frames of a request on the next stream."""
        self._stream_id += 2
        head = HeadersFrame(self._stream_id, data=self._encoder.encode(headers), flags=["END_HEADERS"])
        if not body:
            head.flags.add("END_STREAM")
            return [head]
        return [head, DataFrame(self._stream_id, data=body, flags=["END_STREAM"])]

    def reset(self) -> Frame:
        """The frame that takes the last request back."""
        return RstStreamFrame(self._stream_id, error_code=8)

    def send(self, frames: Sequence[Frame], *, give_up: bool = False) -> int:
        """Send frames; returns the last stream's number. A connection that was ended is no fault unless `give_up`."""
        with contextlib.nullcontext() if give_up else contextlib.suppress(OSError):
            self._connection.sendall(b"".join(frame.serialize() for frame in frames))
        return self._stream_id

    def is_ended(self) -> bool:
        """Whether the edge ended the connection, or said that it takes no more streams."""
        return any(isinstance(frame, GoAwayFrame) for frame in self.frames()) or not self._is_silent

    def frames(self) -> Iterator[Frame]:
        """What the edge sends, until it ends the connection or is silent for five seconds."""
        while head := self._read(_HEAD_BYTES):
            frame, length = Frame.parse_frame_header(memoryview(head))
            frame.parse_body(memoryview(self._read(length) if length else b""))
            if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                self.send([SettingsFrame(flags=["ACK"])])
            if isinstance(frame, PingFrame) and "ACK" not in frame.flags:
                self.send([PingFrame(opaque_data=frame.opaque_data, flags=["ACK"])])
            yield frame

    def _read(self, n_bytes: int) -> bytes:
        while len(self._received) < n_bytes:
            try:
                part = self._connection.recv(65536)
            except TimeoutError:
                self._is_silent = True
                return b""
            except OSError:
                return b""
            if not part:
                return b""
            self._received += part
        taken, self._received = self._received[:n_bytes], self._received[n_bytes:]
        return taken
