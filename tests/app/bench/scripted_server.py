"""An HTTP server that answers by a script: enough of one to measure against, and to misbehave on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Answer = bytes | None  # None: never answer


def answer(status: int, document: object, headers: str = "") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def prediction(n_windows: int = 1, headers: str = "X-Served-By: ray_serve\r\n") -> bytes:
    return answer(200, {"predictions": {"classification_probs": [[0.2, 0.5, 0.3]] * n_windows}}, headers)


class ScriptedServer:
    """Answers request n with `script(n)`; keeps what it was asked and how many connections came."""

    def __init__(self, script: Callable[[int], Answer]) -> None:
        self._script = script
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.url = ""
        self.conversations: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.conversations.add(task := asyncio.create_task(self._converse(reader, writer)))
        await asyncio.wait({task})
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append((head, await reader.readexactly(length)))
                told = self._script(len(self.requests) - 1)
                if told is None:
                    continue
                writer.write(told)
                if told == b"" or b"Connection: close" in told:
                    return


@asynccontextmanager
async def serving(script: Callable[[int], Answer]) -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer(script)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        for conversation in scripted.conversations:
            conversation.cancel()
        await asyncio.gather(*scripted.conversations, return_exceptions=True)
        while asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.sleep(0)
