"""Slow clients, many at once, in a process of their own: `python -m tests.docker.edge.slow_clients '{…}'`.

A third sends headers that never end, a third bodies that never end, a third asks much and reads almost nothing. Who
loses the connection makes a new one at once. They come from many loopback addresses, so that no cap on one of them
makes the attack smaller, and not all in one moment: what many machines do has no common clock. A line on standard
output tells once a second how many connections are held, and when: by the monotonic clock, which is the same for all
processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve_app.contract import WINDOW_BYTES
from tests.docker.edge.process import HOST

_PER_ADDRESS = 16
_PAUSE_S = 1.0
_RAMP_S = 5.0  # within which the first connections are made; the edge ends a header that is not whole after as long
_N_WINDOWS = 8
_READ_BYTES = 16


@dataclass(frozen=True)
class Attack:
    """Where and how: `ca_file` is the edge's authority, `authorization` a header's value."""

    port: int
    ca_file: str
    authorization: str
    n_connections: int


def source_of(number: int) -> str:
    """A loopback address of this connection and a few others."""
    address = number // _PER_ADDRESS
    return f"127.1.{address // 250}.{1 + address % 250}"


class SlowClients:
    def __init__(self, attack: Attack) -> None:
        self.n_held = 0
        self.n_lost = 0
        self._attack = attack
        self._context = ssl.create_default_context(cafile=attack.ca_file)

    async def run(self) -> None:
        kinds = itertools.cycle((self._drip_headers, self._drip_body, self._read_slowly))
        async with asyncio.TaskGroup() as group:
            for number, act in zip(range(n := self._attack.n_connections), kinds, strict=False):
                group.create_task(self._hold(source_of(number), act, after_s=_RAMP_S * number / n))
            while True:
                await asyncio.sleep(1)
                print(json.dumps({"at": time.monotonic(), "held": self.n_held, "lost": self.n_lost}), flush=True)

    async def _hold(
        self, source: str, act: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], after_s: float
    ) -> None:
        await asyncio.sleep(after_s)
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await self._connect(source)
                self.n_held += 1
                try:
                    await act(reader, writer)
                finally:
                    self.n_held -= 1
                    self.n_lost += 1
                    writer.transport.abort()
            await asyncio.sleep(0.1)

    async def _connect(self, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.setblocking(False)
        raw.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self._attack.port))
        return await asyncio.open_connection(sock=raw, ssl=self._context, server_hostname=HOST, limit=1024)

    async def _drip_headers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n".encode())
        while not reader.at_eof():
            await asyncio.sleep(_PAUSE_S)
            writer.write(b"X: a\r\n")
            await writer.drain()

    async def _drip_body(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"POST /ray-serve/predict HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 900000\r\n\r\n".encode())
        while not reader.at_eof():
            await asyncio.sleep(_PAUSE_S)
            writer.write(b"a")
            await writer.drain()

    async def _read_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = bytes(_N_WINDOWS * WINDOW_BYTES)
        head = (
            f"POST /ray-serve/predict?return_features=true HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: application/octet-stream\r\nAuthorization: {self._attack.authorization}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        while await reader.read(_READ_BYTES):
            await asyncio.sleep(_PAUSE_S)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(SlowClients(Attack(**json.loads(sys.stdin.readline()))).run())
