"""How the evidence of all workers comes together: each adds what it saw, and the controller reads the sums."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from app.rollout.evidence import NAMES, Evidence
from app.rollout.record import Record
from app.shared.commands import Command, Link, RedisAway, Script

_LOGGER = logging.getLogger(__name__)

_PERIOD_S = 0.25
_TIMEOUT_S = 0.25
_KEPT_S = 7 * 86_400  # of no use once the plan has ended; long enough to look at

_ADD = Script(
    """
for i = 2, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""
)


class EvidenceAway(Exception):
    """The evidence of the others cannot be reached now."""


class Pool(Protocol):
    """Adds up the evidence of an epoch."""

    async def add(self, epoch: str, evidence: Evidence) -> None:
        """Put it in. Raises `EvidenceAway`; it may be in all the same."""

    async def total(self, epoch: str) -> Evidence:
        """All that was put in. Raises `EvidenceAway`."""

    async def close(self) -> None:
        """Give back what was opened on the way."""


class LocalPool:
    """Of one process; only the newest epoch is kept."""

    def __init__(self) -> None:
        self._epoch = ""
        self._total = Evidence()

    async def add(self, epoch: str, evidence: Evidence) -> None:
        if epoch != self._epoch:
            self._epoch, self._total = epoch, Evidence()
        self._total.add(evidence)

    async def total(self, epoch: str) -> Evidence:
        return Evidence(self._total.counts) if epoch == self._epoch else Evidence()

    async def close(self) -> None: ...


class RedisPool:
    """Of all workers of all gateways, in the shared Redis.

    Args:
        link: To Redis, for this object alone.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def add(self, epoch: str, evidence: Evidence) -> None:
        words = [word for name, count in evidence.counts.items() for word in (name, count)]
        await self._ask(_ADD.call([_key(epoch)], [_KEPT_S, *words]))

    async def total(self, epoch: str) -> Evidence:
        found = await self._ask(Command(None, ("HGETALL", _key(epoch))))
        flat = [part for pair in found.items() for part in pair] if isinstance(found, dict) else found
        counts = zip((name.decode() for name in flat[::2]), map(int, flat[1::2]), strict=True)
        return Evidence({name: count for name, count in counts if name in NAMES})

    async def close(self) -> None:
        await self._link.close()

    async def _ask(self, command: Command) -> Any:
        try:
            [answer] = await self._link.ask([command], _TIMEOUT_S)
        except RedisAway as away:
            raise EvidenceAway(str(away)) from None
        if isinstance(answer, RedisAway):
            raise EvidenceAway(str(answer))
        return answer


class Gatherer:
    """Sends what this worker has seen to the pool, in the epoch in which it was seen.

    Args:
        evidence: What the worker sees is added to it, for ever.
        pool: Where it goes.
        record: Gives the record in force, whose epoch it is.
    """

    def __init__(self, evidence: Evidence, pool: Pool, record: Callable[[], Record]) -> None:
        self._evidence = evidence
        self._pool = pool
        self._record = record
        self._epoch: str | None = None
        self._sent = Evidence()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._keep_sending())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._pool.close()

    async def send(self) -> None:
        """Send what came since the last time; what was seen across a change of epoch belongs to neither.

        What gets lost on the way stays lost: sent again it might count twice, and evidence of both sides is lost alike.
        """
        epoch = self._record().epoch
        now = Evidence(self._evidence.counts)
        new, is_same = now.since(self._sent), epoch == self._epoch
        self._sent, self._epoch = now, epoch
        if epoch is None or not is_same or not any(new.counts.values()):
            return
        await self._pool.add(epoch, Evidence({name: count for name, count in new.counts.items() if count}))

    async def _keep_sending(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await self.send()
            except EvidenceAway as away:
                _LOGGER.debug("evidence was not sent: %s", away)
            except Exception:
                _LOGGER.exception("evidence was not sent, for a reason that was not foreseen")


def _key(epoch: str) -> str:
    return f"sluice:evidence:{epoch}"
