from __future__ import annotations

import asyncio

import pytest

from app.errors import TooManyAtOnce
from app.rate_limit.concurrency import Concurrency


def test_the_limit_holds_for_each_account_by_itself() -> None:
    concurrency = Concurrency(2)
    with concurrency.place("a"), concurrency.place("a"), concurrency.place("b"):
        with pytest.raises(TooManyAtOnce, match="2 requests"), concurrency.place("a"):
            pass
        assert concurrency.under_way == {"a": 2, "b": 1}
    assert concurrency.under_way == {}


async def test_a_place_is_given_back_however_the_block_ends() -> None:
    concurrency = Concurrency(1)
    with pytest.raises(RuntimeError), concurrency.place("a"):
        raise RuntimeError

    async def wait() -> None:
        with concurrency.place("a"):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert concurrency.under_way == {"a": 1}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert concurrency.under_way == {}


def test_who_is_refused_takes_no_place_from_those_inside() -> None:
    concurrency = Concurrency(1)
    with concurrency.place("a"):
        for _ in range(3):
            with pytest.raises(TooManyAtOnce), concurrency.place("a"):
                pass
        assert concurrency.under_way == {"a": 1}
