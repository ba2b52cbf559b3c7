"""A stand-in for the old FastAPI service: real sockets, and answers, hangs or garbage as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

# What it does with a request: gives the whole response, or None to hang.
Behaviour = Callable[["Received"], bytes | None]


@dataclass
class Received:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def marks(self) -> list[float]:
        """The first value of each window."""
        return [window[0][0] for window in self.document["data"]]


def response(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def answer_for(received: Received) -> dict[str, Any]:
    """The whole shape; the expected return is the window's mark."""
    marks = received.marks
    return {
        "predictions": {
            "classification_probs": [[0.25, 0.5, 0.25] for _ in marks],
            "regression_pred": marks,
            "ensemble_weights": [[0.2, 0.3, 0.5] for _ in marks],
        },
        "processing_time_ms": 0.5,
        "uncertainty": {
            "regression_uncertainty": [1.0 for _ in marks],
            "aleatoric": [0.8 for _ in marks],
            "epistemic": [0.6 for _ in marks],
            "predictive_entropy": [1.0 for _ in marks],
        },
    }


def behave_well(received: Received) -> bytes:
    return response(json.dumps(answer_for(received)).encode())


class OldService:
    """Listens on a loopback port while the block lasts.

    Attributes:
        behave: What it does with each request.
        dripping: Sends its answers byte by byte with a wait between them.
        received: Every request that came whole.
        open_connections: Connections open now; `most_connections` at any time.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.behave: Behaviour = behave_well
        self.dripping = False
        self.received: list[Received] = []
        self.open_connections = 0
        self.most_connections = 0
        self.port = 0
        self._tls = tls
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls, limit=1 << 22)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.open_connections += 1
        self.most_connections = max(self.most_connections, self.open_connections)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await self._exchange(reader, writer)
        except asyncio.CancelledError:
            pass  # at the end of the block; asyncio's own callback would speak of it
        finally:
            self.open_connections -= 1
            self._connections.discard(task)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        received = Received(head[0].split(" ")[1], headers, json.loads(body or b"{}"))
        self.received.append(received)
        reply = self.behave(received)
        if reply is None:
            await reader.read()  # hangs until the caller hangs up
            raise ConnectionAbortedError
        for part in [bytes([byte]) for byte in reply] if self.dripping else [reply]:
            writer.write(part)
            await writer.drain()
            if self.dripping:
                await asyncio.sleep(0.01)
        if b"Content-Length" not in reply or b"Connection: close" in reply:
            raise ConnectionAbortedError
