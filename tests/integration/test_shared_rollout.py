"""A plan run by several gateways over a real Redis: evidence adds up, one controller acts, another takes over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from app.rollout import moves
from app.rollout.controller import Controller
from app.rollout.evidence import Evidence
from app.rollout.gathering import EvidenceAway, Gatherer, RedisPool
from app.rollout.lease import RedisLease
from app.rollout.moves import By
from app.rollout.plan import Guard, Plan, Step
from app.rollout.rollout import Rollout, check_document
from app.rollout.shared_state import CopiedStore, RedisStore
from app.rollout.state import FileStore
from app.shared.address import parse_redis_url
from app.shared.link import RedisLink
from tests.app.rollout.rollouts import rollout_over
from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.integration

PLAN = Plan(
    steps=(Step(share=0.1, hold_s=0, samples=100), Step(share=1.0, hold_s=0, samples=100)),
    guards=(Guard(signal="errors", slack=0.01),),
)


class Gateway:
    """What one gateway has of the rollout; ticked by hand."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        def link() -> RedisLink:
            return RedisLink(parse_redis_url(redis.url))

        def store() -> CopiedStore:
            return CopiedStore(RedisStore(link(), check_document), FileStore(folder, check_document))

        self.now = 1000.0
        self.pool = RedisPool(link())
        self.rollout: Rollout = rollout_over(store(), 0.0)
        self.evidence = Evidence()
        self.gatherer = Gatherer(self.evidence, self.pool, lambda: self.rollout.record)
        self.lease = RedisLease(link())
        self.controller = Controller(self.rollout, self.pool, self.lease, store(), wall_clock=lambda: self.now)

    async def look(self) -> None:
        """What its services do a few times a second."""
        await self.rollout.load()
        await self.gatherer.send()
        await self.controller.tick()

    async def stop(self) -> None:
        await self.controller.stop()
        await self.gatherer.stop()
        await self.rollout.stop()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
async def gateways(redis: RedisServer, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Gateway]]:
    here, there = (Gateway(redis, tmp_path / name) for name in ("here", "there"))
    await here.rollout.change(lambda record: moves.start(record, PLAN, "run", By("ann", 1000.0)), "start")
    for gateway in (here, there):
        await gateway.look()
    yield here, there
    for gateway in (here, there):
        await gateway.stop()


def answer(gateway: Gateway, n: int, *, failed: int = 0) -> None:
    for _ in range(n):
        gateway.evidence.count_answer("canary", 0.01)
        gateway.evidence.count_answer("stable", 0.01)
    for _ in range(failed):
        gateway.evidence.count_failure("canary")


async def test_what_two_gateways_saw_passes_a_step_that_neither_would_alone(
    gateways: tuple[Gateway, Gateway],
) -> None:
    here, there = gateways
    for gateway in gateways:
        answer(gateway, 60)
        await gateway.gatherer.send()
    await here.look()
    await there.look()
    assert (here.rollout.record.share, there.rollout.record.share) == (1.0, 1.0)


async def test_the_second_controller_takes_over_what_the_first_has_judged(gateways: tuple[Gateway, Gateway]) -> None:
    here, there = gateways
    answer(here, 50, failed=3)
    await here.gatherer.send()
    here.now += 2
    await here.look()  # `here` came first and has the lease; then it is gone without a word
    judged = await there.controller.findings()
    async with asyncio.timeout(20):
        while there.rollout.record.epoch is not None:
            answer(there, 10, failed=10)
            await there.look()
            await asyncio.sleep(0.1)
    record = there.rollout.record
    assert judged is not None
    assert judged["samples"] == 53
    assert record.run is not None
    assert (record.run.phase, record.changed_by) == ("rolled_back", "controller")


async def test_while_redis_is_away_every_share_stays_and_the_plan_goes_on_afterwards(
    gateways: tuple[Gateway, Gateway], redis: RedisServer
) -> None:
    here, there = gateways
    redis.hang()
    answer(here, 200)
    with pytest.raises(EvidenceAway):
        await here.gatherer.send()
    for gateway in gateways:
        await gateway.rollout.load()
        await gateway.controller.tick()
    assert (here.rollout.record.share, there.rollout.record.share) == (0.1, 0.1)
    redis.resume()
    async with asyncio.timeout(20):
        while here.rollout.record.share != 1.0:
            answer(here, 50)
            here.now += 1
            with suppress(EvidenceAway):
                await here.look()
            await asyncio.sleep(0.1)
