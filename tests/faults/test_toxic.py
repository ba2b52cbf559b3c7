"""The bad network is bad in the way it says, and good when nothing is asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.toxic import CLEAN, ToxicProxy, Toxics

PATIENCE_S = 5.0


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    open_: set[asyncio.StreamWriter] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_.add(writer)
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                writer.write(piece)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in open_:
        writer.transport.abort()
    for _ in range(3):
        await asyncio.sleep(0)  # what was aborted ends on the loop's next turns


@pytest.fixture
def proxy(echo_port: int) -> Iterator[ToxicProxy]:
    proxy = ToxicProxy(echo_port)
    yield proxy
    proxy.close()


async def say(proxy: ToxicProxy, message: bytes) -> bytes:
    """What comes back, as long as the message, or less where the connection ends before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            writer.write(message)
            return await reader.readexactly(len(message))
    except asyncio.IncompleteReadError as error:
        return error.partial
    finally:
        writer.transport.abort()


async def test_all_bytes_pass_when_nothing_is_asked_of_it(proxy: ToxicProxy) -> None:
    message = bytes(range(256)) * 1000
    assert await say(proxy, message) == message


async def test_latency_is_added_both_ways(proxy: ToxicProxy) -> None:
    proxy.toxics = Toxics(latency_s=0.1)
    began = time.monotonic()
    assert await say(proxy, b"x") == b"x"
    assert time.monotonic() - began >= 0.2


async def test_slices_arrive_whole_and_late(proxy: ToxicProxy) -> None:
    proxy.toxics = Toxics(slice_bytes=10, slice_wait_s=0.01)
    began = time.monotonic()
    assert await say(proxy, b"y" * 100) == b"y" * 100
    assert time.monotonic() - began >= 0.1


async def test_bandwidth_is_kept(proxy: ToxicProxy) -> None:
    proxy.toxics = Toxics(bandwidth_bytes_s=10_000)
    began = time.monotonic()
    assert await say(proxy, b"z" * 1000) == b"z" * 1000
    assert time.monotonic() - began >= 0.1


async def test_an_answer_ends_at_its_limit(proxy: ToxicProxy) -> None:
    proxy.toxics = Toxics(limit_bytes=7)
    with pytest.raises(ConnectionResetError):
        await say(proxy, b"0123456789")


async def test_a_black_hole_takes_and_gives_nothing(proxy: ToxicProxy) -> None:
    proxy.toxics = Toxics(blackhole=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(say(proxy, b"x"), 0.3)


async def test_a_reset_is_one(proxy: ToxicProxy) -> None:
    proxy.toxics = Toxics(reset=True)
    with pytest.raises(ConnectionResetError):
        await say(proxy, b"x")


async def test_while_it_is_down_connections_are_refused_and_then_it_listens_where_it_did(proxy: ToxicProxy) -> None:
    port = proxy.port
    await asyncio.to_thread(proxy.down)
    with pytest.raises(ConnectionRefusedError):
        await say(proxy, b"x")
    await asyncio.to_thread(proxy.up)
    assert proxy.port == port
    proxy.toxics = CLEAN
    assert await say(proxy, b"x") == b"x"
