"""The rollout's state in a real Redis, which forgets, holds something else, or is lost during a change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.rollout.rollout import Rollout, check_document
from app.rollout.shared_state import CopiedStore, RedisStore
from app.rollout.state import FileStore, StateAway, StateConflict, StateDoubtful
from app.shared.address import parse_redis_url
from app.shared.commands import Command, RedisAway
from app.shared.link import RedisLink
from tests.app.rollout.rollouts import rollout_over, set_share
from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.integration

KEY = "sluice:state:rollout"
GOOD = {"ray_serve_fraction": 0.5, "changed_at": 1.0, "changed_by": "eve"}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def store_on(redis: RedisServer) -> RedisStore:
    return RedisStore(RedisLink(parse_redis_url(redis.url)), check_document)


def gateway_on(redis: RedisServer, folder: Path) -> Rollout:
    return rollout_over(CopiedStore(store_on(redis), FileStore(folder, check_document)), 1.0)


@pytest.mark.parametrize(
    "write",
    [
        ("SET", KEY, "x"),
        ("HSET", KEY, "version", "9"),
        ("HSET", KEY, "version", "9", "document", json.dumps({**GOOD, "ray_serve_fraction": "x", "version": 9})),
        ("HSET", KEY, "version", "9", "document", json.dumps({"version": 9})),
        ("HSET", KEY, "version", "9", "document", json.dumps({**GOOD, "more": 1, "version": 9})),
        ("HSET", KEY, "version", "1e400", "document", json.dumps({**GOOD, "version": 9})),
        ("HSET", KEY, "version", str(2**53 + 1), "document", json.dumps({**GOOD, "version": 2**53 + 1})),
        ("HSET", KEY, "version", "9", "document", "[" * 60_000),
    ],
    ids=["a text", "no document", "no number", "no share", "more", "two versions", "no end of versions", "deep"],
)
@pytest.mark.parametrize("knows", [True, False], ids=["with a copy", "without"])
async def test_a_wrong_document_goes_no_further_and_the_next_change_replaces_it(
    redis: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, write: tuple[str, ...], knows: bool
) -> None:
    here = gateway_on(redis, tmp_path / "here")
    if knows:
        await set_share(here, 0.4, "ann")
    redis.say("DEL", KEY)
    redis.say(*write)
    await here.load()
    assert here.record.share == (0.4 if knows else 1.0)
    if write[0] == "HSET":
        assert "no document of ours" in caplog.text
    await set_share(here, 0.3, "ann")
    there = gateway_on(redis, tmp_path / "there")
    await there.load()
    assert there.record == here.record
    for rollout in (here, there):
        await rollout.stop()
    redis.kill()
    restarted = gateway_on(redis, tmp_path / "here")
    await restarted.start()
    assert restarted.record.share == 0.3
    await restarted.stop()


async def test_a_change_to_redis_that_forgot_waits_for_whoever_remembers(redis: RedisServer, tmp_path: Path) -> None:
    copy = FileStore(tmp_path / "old", check_document)
    old = rollout_over(CopiedStore(store_on(redis), copy), 1.0, refresh_period_s=0.25)
    await old.start()
    for fraction in (0.1, 0.2, 0.3):
        await set_share(old, fraction, "ann")
    redis.say("FLUSHALL")
    fresh = gateway_on(redis, tmp_path / "fresh")
    await set_share(fresh, 0.9, "ben")
    await asyncio.sleep(0.6)
    await fresh.load()
    assert old.record == fresh.record
    assert old.record.share == 0.9
    assert (await stored_in(redis)).version == 4
    for rollout in (old, fresh):
        await rollout.stop()


async def stored_in(redis: RedisServer) -> Any:
    store = store_on(redis)
    try:
        return await store.read("rollout")
    finally:
        await store.close()


class LossyLink:
    """A link that loses the answers to changes, or the changes themselves."""

    def __init__(self, redis: RedisServer, *, arrives: bool) -> None:
        self._link = RedisLink(parse_redis_url(redis.url))
        self._arrives = arrives

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        is_change = commands[0].script is not None
        answers = await self._link.ask(commands, timeout_s) if self._arrives or not is_change else []
        if is_change and (not answers or answers[0][0] == b"written"):
            raise RedisAway("TimeoutError")
        return answers

    async def close(self) -> None:
        await self._link.close()


async def test_a_change_of_which_nothing_was_heard_is_looked_for(redis: RedisServer) -> None:
    store = RedisStore(LossyLink(redis, arrives=True), check_document)
    await store.write("rollout", GOOD, 1)
    assert await store.read("rollout") == (GOOD, 1)
    await store.close()


async def test_a_change_that_is_not_found_may_still_come_and_one_that_was_never_sent_may_not(
    redis: RedisServer,
) -> None:
    store = RedisStore(LossyLink(redis, arrives=False), check_document)
    with pytest.raises(StateDoubtful):
        await store.write("rollout", GOOD, 1)
    redis.kill()
    with pytest.raises(StateAway) as caught:
        await store.write("rollout", GOOD, 1)
    assert not isinstance(caught.value, StateDoubtful)
    await store.close()


async def test_of_two_who_write_one_version_one_is_told(redis: RedisServer) -> None:
    store = store_on(redis)
    await store.write("rollout", GOOD, 1)
    with pytest.raises(StateConflict):
        await store.write("rollout", {**GOOD, "changed_by": "ben"}, 1)
    assert await store.read("rollout") == (GOOD, 1)
    await store.close()
