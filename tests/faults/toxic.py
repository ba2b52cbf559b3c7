"""A TCP proxy that can be as bad as a network: put between the gateway and what it depends on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time: the close is a reset


@dataclass(frozen=True)
class Toxics:
    """What is done to every byte that passes, in both directions; the default lets all pass.

    Attributes:
        latency_s: Added to each piece.
        jitter_s: Added to that at random, up to so much.
        bandwidth_bytes_s: Bytes that pass in a second.
        slice_bytes: Pieces are cut into slices of this size,
        slice_wait_s: with so much time before each.
        limit_bytes: A connection is closed after so many bytes of answers.
        blackhole: Bytes are taken and go nowhere; connections stay open.
        reset: Every connection is reset with its first bytes.
        slow_close_s: How much later the other side hears of a connection's end.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth_bytes_s: float = 0.0
    slice_bytes: int = 0
    slice_wait_s: float = 0.0
    limit_bytes: int = 0
    blackhole: bool = False
    reset: bool = False
    slow_close_s: float = 0.0


CLEAN = Toxics()


class ToxicProxy:
    """Forwards a loopback port to another one, on a thread of its own, as its toxics let it.

    Attributes:
        port: Where it listens; the same after `down` and `up`.
        accepted: Connections so far.
    """

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.upstream_port = upstream_port
        self.port = 0
        self.accepted = 0
        self.toxics = CLEAN
        self._dice = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.up()

    def up(self) -> None:
        """Listen."""
        self._run(self._listen())

    def down(self) -> None:
        """Refuse connections, and reset those that are open."""
        self._run(self._refuse())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._open:
            connection.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)  # what was aborted ends on the loop's next turns

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._join(reader, writer)
        finally:
            self._open.discard(task)
            _reset(writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        ways = [
            asyncio.create_task(self._carry(reader, up_writer, answers=False)),
            asyncio.create_task(self._carry(up_reader, writer, answers=True)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(self.toxics.slow_close_s)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            up_writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        passed_bytes = 0
        while piece := await reader.read(CHUNK_BYTES):
            toxics = self.toxics
            if toxics.reset:
                return
            if toxics.blackhole:
                continue
            if answers and toxics.limit_bytes:
                piece = piece[: max(0, toxics.limit_bytes - passed_bytes)]
            await self._pass(piece, writer, toxics)
            passed_bytes += len(piece)
            if answers and toxics.limit_bytes and passed_bytes >= toxics.limit_bytes:
                return

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter, toxics: Toxics) -> None:
        await asyncio.sleep(toxics.latency_s + toxics.jitter_s * self._dice.random())
        step = toxics.slice_bytes or len(piece) or 1
        for start in range(0, len(piece), step):
            part = piece[start : start + step]
            wait_s = toxics.slice_wait_s + (len(part) / toxics.bandwidth_bytes_s if toxics.bandwidth_bytes_s else 0)
            if wait_s:
                await asyncio.sleep(wait_s)
            writer.write(part)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
