"""SIGTERM in a process of its own: the notice comes first, the server's own end after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

from tests.app.under_test import MakeGateway, some_windows

_LEAVE = """
import asyncio, os, signal, time
from app.drain import Drain

async def main():
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(ended.set))  # as a server does
    drain = Drain()
    drain.begin_on_sigterm({notice_s})
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    print(drain.has_begun, ended.is_set())
    {then}
    await asyncio.wait_for(ended.wait(), 10)
    print(drain.has_begun, ended.is_set())

asyncio.run(main())
"""


def _leave(notice_s: float, then: str = "pass") -> list[str]:
    program = _LEAVE.format(notice_s=notice_s, then=then)
    process = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    return process.stdout.splitlines()


def test_sigterm_is_told_before_the_server_ends() -> None:
    assert _leave(0.5) == ["True False", "True True"]


def test_a_second_sigterm_ends_the_notice() -> None:
    assert _leave(3600, "os.kill(os.getpid(), signal.SIGTERM)") == ["True False", "True True"]


async def test_a_gateway_that_leaves_is_not_ready_and_closes_every_connection_with_its_answer(
    make_gateway: MakeGateway,
) -> None:
    def closes(response: httpx.Response) -> tuple[int, str | None]:
        return response.status_code, response.headers.get("connection")

    async with make_gateway() as gateway:
        assert closes(await gateway.client.get("/health/ready")) == (200, None)
        assert closes(await gateway.predict(some_windows(1))) == (200, None)
        gateway.app.state.gateway.drain.begin()
        assert closes(await gateway.client.get("/health/ready")) == (503, "close")
        assert closes(await gateway.client.get("/v2/health/ready")) == (503, "close")
        assert closes(await gateway.client.get("/health/live")) == (200, "close")
        assert closes(await gateway.predict(some_windows(1))) == (200, "close")
        assert closes(await gateway.client.get("/nowhere")) == (404, "close")
