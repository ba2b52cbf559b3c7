"""A gateway that only takes notes: what arrives behind the edge, request by request and byte by byte."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import httptools

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{"recorded":1}'


@dataclass
class Recorded:
    """One request as a gateway gets it; header names as they came."""

    method: str = ""
    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    is_whole: bool = False
    is_answered: bool = False  # and the answer has left

    def header(self, name: str) -> list[str]:
        """Every value of the header of this name."""
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == name.lower().encode()]


class _Connection(asyncio.Protocol):
    """One connection; speaks to httptools, as uvicorn does."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._recorder.connections.add(self)
        self._recorder.n_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._recorder.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._recorder.unparsable.append(data)
            self._transport.close()

    def on_message_begin(self) -> None:
        self._request = Recorded()
        self._recorder.requests.append(self._request)

    def on_url(self, url: bytes) -> None:
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._request.body += body

    def on_message_complete(self) -> None:
        self._request.method = self._parser.get_method().decode()
        self._request.is_whole = True
        if self._recorder.answer is not None:
            self.answer(self._recorder.answer)

    def answer(self, answer: bytes) -> None:
        """Send this; nothing at all means to end the connection."""
        self._transport.set_write_buffer_limits(0)
        self._transport.write(answer)
        self._request.is_answered = not self._transport.get_write_buffer_size()
        if not answer:
            self._transport.close()

    def resume_writing(self) -> None:
        self._request.is_answered = True

    def end(self) -> None:
        self._transport.close()


class Recorder:
    """Listens on a free loopback port, in a thread of its own.

    Attributes:
        requests: What arrived, oldest first.
        unparsable: Parts that were no HTTP.
        answer: What every request is answered with, byte by byte; None for silence, nothing for a hang-up.
        connections: Those that are open.
        n_connections: How many there ever were.

    Args:
        port: To listen on; a free one unless given.
    """

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self.connections: set[_Connection] = set()
        self.n_connections = 0
        self.requests: list[Recorded] = []
        self.unparsable: list[bytes] = []
        self.answer: bytes | None = ANSWER
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        self._server = self._run(self._listen())
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def forget(self) -> None:
        """Begin anew."""
        self.requests.clear()
        self.unparsable.clear()
        self.answer = ANSWER

    @property
    def n_open(self) -> int:
        return len(self.connections)

    def answer_now(self, answer: bytes) -> None:
        """Answer what was met with silence so far."""
        self._run(self._answer(answer))

    def _run(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", self._port)

    async def _close(self) -> None:
        self._server.close()
        for connection in list(self.connections):
            connection.end()
        await asyncio.sleep(0)

    async def _answer(self, answer: bytes) -> None:
        for connection in list(self.connections):
            connection.answer(answer)
