"""Clients that come back: each asks, waits as long as it is told to, and asks again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from typing import NamedTuple

from tests.integration.open_loop import PATIENCE_S, Answer, Connection, Stream, nothing, request_bytes

CALM_S = 5.0


class Asked(NamedTuple):
    client: int
    sent: float
    ended: float
    status: int


class Crowd:
    """Many clients of one kind, from a thread; a client that was answered asks again after a calm while.

    Args:
        stream: What they ask; its rate says nothing here.
        clients: How many.
    """

    def __init__(self, stream: Stream, clients: int) -> None:
        self.asked: list[Asked] = []
        self._stream = stream
        self._clients = clients
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._ended = asyncio.Event()
        self._thread.start()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(PATIENCE_S + 2)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(each.status for each in self.asked)

    def all_served_after(self, moment: float) -> float | None:
        """When the last client had its first 200 that was sent after the moment; None when some had none."""
        first: dict[int, float] = {}
        for each in self.asked:
            if each.status == 200 and each.sent >= moment:
                first.setdefault(each.client, each.ended)
        return max(first.values()) if len(first) == self._clients else None

    async def _run(self) -> None:
        dice = random.Random(1)
        tasks = [asyncio.ensure_future(self._live(number, dice.random() * CALM_S)) for number in range(self._clients)]
        await self._ended.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _live(self, number: int, first_pause_s: float) -> None:
        await asyncio.sleep(first_pause_s)
        while True:
            sent = time.monotonic()
            answer = await self._ask()
            self.asked.append(Asked(number, sent, time.monotonic(), answer.status))
            await asyncio.sleep(CALM_S if answer.status == 200 else float(answer.headers.get("retry-after", 0)))

    async def _ask(self) -> Answer:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(PATIENCE_S):
                _, connection = await self._loop.create_connection(
                    lambda: Connection(None), "127.0.0.1", self._stream.port
                )
                try:
                    return await connection.ask(request_bytes(self._stream, close=True))
                finally:
                    connection.hang_up()
        return nothing("silent")
