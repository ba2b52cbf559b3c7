"""What only a real server and real sockets can show."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from app.http_protocol import LINGER_S, MAX_LINGER_BYTES, HttpProtocol
from tests.app.under_test import GatewayUnderTest, some_windows


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
    """The port on which uvicorn serves the application; its lifespan is the fixture's."""
    config = uvicorn.Config(
        app,
        port=0,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())  # `serve` would take over the process's signals
    while not server.started:
        await asyncio.sleep(0.001)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


def head(gateway: GatewayUnderTest, *lines: str, authorized: bool = True) -> bytes:
    token = [f"Authorization: Bearer {gateway.token()}"] if authorized else []
    fixed = ["POST /ray-serve/predict HTTP/1.1", "Host: gateway", "Content-Type: application/octet-stream"]
    return "\r\n".join([*fixed, *token, *lines, "", ""]).encode()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    text = (await reader.readuntil(b"\r\n\r\n")).decode()
    status_line, *lines = text.strip().split("\r\n")
    return int(status_line.split()[1]), {line.split(": ")[0].lower(): line.split(": ", 1)[1] for line in lines}


async def send_until_cut(writer: asyncio.StreamWriter, limit_bytes: int) -> int:
    """Send chunks until the server closes the connection; returns the bytes that went out."""
    chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < limit_bytes:
            writer.write(chunk)
            await writer.drain()
            sent += len(chunk)
            await asyncio.sleep(0)
    return sent


async def test_a_client_that_hangs_up_frees_its_call_within_a_tenth_of_a_second(gateway: GatewayUnderTest) -> None:
    gateway.ray_serve.gate.clear()
    async with listening(gateway.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(gateway, "Content-Length: 12000") + some_windows(1).tobytes())
        while not gateway.calls():
            await asyncio.sleep(0.001)
        cancelled_before = gateway.ray_serve.cancelled
        left_at = time.monotonic()
        writer.close()
        while gateway.ray_serve.cancelled == cancelled_before:
            await asyncio.sleep(0.001)
        assert time.monotonic() - left_at < 0.1


async def test_a_giant_in_chunks_is_refused_at_the_cap_and_the_connection_closed(gateway: GatewayUnderTest) -> None:
    async with listening(gateway.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(gateway, "Transfer-Encoding: chunked"))
        sent = await send_until_cut(writer, limit_bytes=1 << 30)
        assert sent < MAX_LINGER_BYTES + (16 << 20)  # what is thrown away, the cap, and what socket buffers held
        writer.close()


async def test_the_refusal_of_a_giant_can_be_read(gateway: GatewayUnderTest) -> None:
    async with listening(gateway.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(gateway, f"Content-Length: {1 << 30}"))
        status, headers = await read_head(reader)
        assert status == 413
        assert headers["connection"] == "close"
        await reader.read()
        assert reader.at_eof()
        writer.close()


async def parts_of(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 50_000):
        yield body[start : start + 50_000]


@pytest.mark.parametrize("size_bytes", [2 << 20, 8 << 20, 32 << 20])
@pytest.mark.parametrize("in_chunks", [True, False])
async def test_an_ordinary_client_that_posts_too_much_is_told_so(
    gateway: GatewayUnderTest, size_bytes: int, in_chunks: bool
) -> None:
    body = bytes(size_bytes)
    headers = {"Content-Type": "application/octet-stream", **gateway.bearer()}
    async with listening(gateway.app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        response = await client.post(
            "/ray-serve/predict", content=parts_of(body) if in_chunks else body, headers=headers
        )
        assert response.status_code == 413
        assert response.json()["detail"] == f"a body may have at most {1 << 20} bytes"


@pytest.mark.parametrize(
    ("path", "content_type", "authorized", "status"),
    [
        ("/ray-serve/predict", "application/octet-stream", False, 401),
        ("/nope", "application/octet-stream", True, 404),
        ("/ray-serve/predict", "text/plain", True, 415),
    ],
)
async def test_nobody_sends_a_body_without_end_behind_a_refusal(
    gateway: GatewayUnderTest, path: str, content_type: str, authorized: bool, status: int
) -> None:
    token = f"Authorization: Bearer {gateway.token()}\r\n" if authorized else ""
    request = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: {content_type}\r\n{token}"
    async with listening(gateway.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        assert (await read_head(reader))[0] == status
        assert await send_until_cut(writer, limit_bytes=1 << 30) < MAX_LINGER_BYTES + (16 << 20)
        writer.close()


@pytest.mark.parametrize("codings", ["gzip, chunked", "gzip\r\nTransfer-Encoding: chunked", "chunked ", "x,chunked"])
async def test_a_body_in_chunks_has_no_other_coding(gateway: GatewayUnderTest, codings: str) -> None:
    body = some_windows(1).tobytes()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with listening(gateway.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((head(gateway, f"Transfer-Encoding: {codings}") + chunks) * 2)
        status, headers = await read_head(reader)
        assert (status, headers["connection"]) == (400, "close")
        assert (await reader.read()).count(b"HTTP/1.1 ") == 0  # neither is the second one answered
        writer.close()
    assert gateway.calls() == []


async def test_a_client_that_is_refused_and_goes_on_does_not_hold_the_server_s_end(gateway: GatewayUnderTest) -> None:
    async with listening(gateway.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(gateway, f"Content-Length: {1 << 30}"))
        assert (await read_head(reader))[0] == 413
        ends_at = time.monotonic()
    assert time.monotonic() - ends_at < LINGER_S / 2
    writer.close()


async def test_a_refusal_leaves_the_connection_good_for_the_next_request(gateway: GatewayUnderTest) -> None:
    body = some_windows(1).tobytes()
    async with listening(gateway.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for authorized, expected in ((False, 401), (True, 200), (False, 401), (True, 200)):
            writer.write(head(gateway, "Content-Length: 12000", authorized=authorized) + body)
            status, headers = await read_head(reader)
            assert status == expected
            assert "server" not in headers
            await reader.readexactly(int(headers["content-length"]))
        writer.close()
