"""Patience: what ends a request's work, and that nothing of it is left in the task."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Receive

from app.api.patience import Patience
from app.errors import ClientGone
from serve_app.contract import DeadlineExceeded

LONG_S = 60.0


async def gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


async def silent() -> dict[str, str]:
    return await asyncio.get_running_loop().create_future()


async def work_watched(seconds: float, receive: Receive) -> None:
    with Patience(seconds) as patience:
        patience.watch(receive)
        await asyncio.sleep(LONG_S)


def assert_nothing_is_left() -> None:
    """Nothing would end what the task does next."""
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_work_that_is_done_in_time_is_undisturbed() -> None:
    with Patience(LONG_S) as patience:
        patience.watch(silent)
        await asyncio.sleep(0)
    assert_nothing_is_left()


async def test_the_deadline_ends_it() -> None:
    with pytest.raises(DeadlineExceeded), Patience(0.0):
        await asyncio.sleep(LONG_S)
    assert_nothing_is_left()


async def test_a_shorter_deadline_takes_the_place_of_the_first() -> None:
    async def work() -> None:
        with Patience(LONG_S) as patience:
            patience.shorten(0.0)
            await asyncio.sleep(LONG_S)

    with pytest.raises(DeadlineExceeded):
        await work()


async def test_a_client_that_leaves_ends_it() -> None:
    with pytest.raises(ClientGone):
        await work_watched(LONG_S, gone)
    assert_nothing_is_left()


async def test_of_two_reasons_the_first_counts() -> None:
    with pytest.raises((ClientGone, DeadlineExceeded)):
        await work_watched(0.0, gone)
    assert_nothing_is_left()
    await asyncio.sleep(0)


async def test_a_failure_of_the_work_is_passed_on() -> None:
    with pytest.raises(ValueError, match="mine"), Patience(LONG_S):
        raise ValueError("mine")


async def test_a_request_that_the_server_cancels_is_not_taken_for_a_client_that_left() -> None:
    request = asyncio.create_task(work_watched(LONG_S, silent))
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_a_server_that_cancels_as_the_client_leaves_is_heard() -> None:
    request = asyncio.create_task(work_watched(LONG_S, gone))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the client has left, and the work is about to hear of it
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
