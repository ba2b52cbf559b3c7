from __future__ import annotations

import asyncio
import time

from app.observability.loop_lag import LoopLag


async def test_what_blocks_the_loop_is_measured() -> None:
    lags: list[float] = []
    lag = LoopLag(lags.append, clock=time.monotonic)
    await lag.start()
    await asyncio.sleep(0.05)
    time.sleep(0.3)  # the very fault that is measured
    while not lags:
        await asyncio.sleep(0.01)
    await lag.stop()
    assert lags[0] >= 0.2


async def test_stopped_it_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    lag = LoopLag(lambda _: None, clock=time.monotonic)
    await lag.stop()
    await lag.start()
    await lag.stop()
    assert asyncio.all_tasks() == before
