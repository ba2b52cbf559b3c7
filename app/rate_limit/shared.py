"""Limits counted in Redis for all workers and gateways, and by each alone while Redis is away."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from limits.aio.storage.redis.bridge import RedisBridge

from app.rate_limit import WINDOW_S, Allowance
from app.rate_limit.memory import LocalLimiter, MinuteCounters
from app.shared.commands import BadKey, Command, Link, RedisAway, Script

_LOGGER = logging.getLogger(__name__)

TIMEOUT_S = 0.05
DOUBT_AFTER_S = 0.015
PROBE_PERIOD_S = 0.5
CONNECT_TIMEOUT_S = 0.5  # nobody waits for it but the probes, and TLS and names take their time
GOOD_PROBES = 2
MAX_LATE = 3
MAX_WAITING = 1024
MAX_TOLD = 10_000

_KEY_PREFIX = "sluice:limit:"
_PROBE_KEY = "probe"
_NO_LIMIT = 1 << 50

# The library's two scripts as one: to count and to look takes one call. All of their time is the time to live that
# Redis gives a key, so no clock but its own is asked.
_SPEND = Script(
    f"""
local function acquire(KEYS, ARGV)
{RedisBridge.SCRIPT_ACQUIRE_SLIDING_WINDOW.decode()}
end
local function look(KEYS, ARGV)
{RedisBridge.SCRIPT_SLIDING_WINDOW.decode()}
end
local admitted = acquire(KEYS, ARGV)
local window = look(KEYS, {{ARGV[2]}})
return {{admitted and 1 or 0, window[1], window[2], window[3], window[4]}}
"""
)
_CLEAR = Script("return redis.call('DEL', KEYS[1], KEYS[2])")


class Spent(NamedTuple):
    """A sliding-window counter of the library, as Redis told it.

    Its count is previous · left / W + current until this fixed window ends; from then on it is what `current` still
    weighs as the last window, if nothing else is spent.

    Attributes:
        previous: Units of the last fixed window.
        current: Units of this one.
        left_s: Seconds until this one ends.
    """

    previous: int
    current: int
    left_s: float

    @property
    def used(self) -> int:
        """Units that count now."""
        return math.floor(self.previous * self.left_s / WINDOW_S) + self.current

    def after(self, seconds: float) -> Spent:
        """The same, so many seconds later, if nothing is spent meanwhile."""
        left_s = self.left_s - seconds
        if left_s > 0:
            return Spent(self.previous, self.current, left_s)
        if left_s > -WINDOW_S:
            return Spent(self.current, 0, left_s + WINDOW_S)
        return Spent(0, 0, WINDOW_S)

    def wait_s(self, room: int) -> float:
        """Seconds until the count has fallen to `room`."""
        if room < 0:
            return WINDOW_S  # more than the whole limit: no wait would help
        if self.current <= room and self.previous > 0:
            return max(0.0, self.left_s - (room - self.current) * WINDOW_S / self.previous)
        return self.left_s + max(0.0, WINDOW_S * (1 - room / self.current)) if self.current else self.left_s


class Verdict(NamedTuple):
    """What Redis made of a request: whether it was counted, and the counter after that."""

    admitted: bool
    spent: Spent


class _Ask(NamedTuple):
    key: str
    cost: int
    command: Command
    answer: asyncio.Future[Verdict | None]


class SharedCounters:
    """The counters in Redis, asked for many requests at once; never waited for when Redis is away, hung or wrong.

    What is asked while a bundle is under way goes with the next one. A bundle that takes long is waited for by its
    first few requests alone, all others are let go without an answer at once; when it fails, nobody asks any more
    until Redis has answered probes, which no request waits for.

    Args:
        link: To Redis, for this object alone.
        on_change: Called with whether Redis is away, whenever that changes.
        timeout_s: Longest that a request waits.
        doubt_after_s: Longest that all but the first few requests of a bundle wait.
        probe_period_s: Seconds between probes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        link: Link,
        *,
        on_change: Callable[[bool], None] = lambda away: None,
        timeout_s: float = TIMEOUT_S,
        doubt_after_s: float = DOUBT_AFTER_S,
        probe_period_s: float = PROBE_PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._doubt_after_s = doubt_after_s
        self._probe_period_s = probe_period_s
        self._waiting: list[_Ask] = []
        self._bundle: list[_Ask] = []
        self._sender: asyncio.Task[None] | None = None
        self._prober: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._owed = MinuteCounters(clock)
        self._in_doubt = False
        self.is_away = False

    async def start(self) -> None:
        """Connect, so that no request need wait for that; returns soon whatever Redis does."""
        if not await self._probe():
            self._leave("at the start")

    async def stop(self) -> None:
        tasks = [task for task in (self._sender, self._prober) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._let_go(self._bundle + self._waiting)
        await self._link.close()

    async def spend(self, key: str, limit: int, cost: int) -> Verdict | None:
        """Count `cost` against the key where the limit allows it; None when Redis does not tell, or not in time."""
        if self.is_away or self._in_doubt or len(self._waiting) >= MAX_WAITING:
            return None
        loop = asyncio.get_running_loop()
        ask = _Ask(key, cost, _SPEND.call(_keys(key), (limit, WINDOW_S, cost)), loop.create_future())
        self._waiting.append(ask)
        if self._sender is None:
            self._sender = loop.create_task(self._send_bundles())
        return await ask.answer

    def owe(self, key: str, cost: int) -> None:
        """Have `cost` counted without asking, when Redis tells again: it was admitted while it did not."""
        self._owed.add(key, cost)

    async def _send_bundles(self) -> None:
        try:
            while self._waiting:
                self._bundle, self._waiting = self._waiting, []
                await self._send(self._bundle)
        finally:
            self._let_go(self._bundle)  # whatever happened, nobody is left waiting
            self._sender = None

    async def _send(self, bundle: list[_Ask]) -> None:
        half_s = self._doubt_after_s / 2
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(half_s, self._look_again, half_s)
        answers: Sequence[Any]
        try:
            answers = await self._link.ask([ask.command for ask in bundle], self._timeout_s - self._doubt_after_s)
        except RedisAway as away:
            answers = [away] * len(bundle)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._in_doubt = False
        for ask, answer in zip(bundle, answers, strict=True):
            self._settle(ask, answer)
        if not self.is_away:
            self._pay()

    def _look_again(self, seconds: float) -> None:
        """Doubt in two steps: a loop that stood still must read what came meanwhile before it judges."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._doubt)

    def _doubt(self) -> None:
        """The bundle takes long: whoever can be spared does not wait for it."""
        self._in_doubt = True
        self._let_go(self._bundle[MAX_LATE:] + self._waiting)
        self._waiting = []

    def _settle(self, ask: _Ask, answer: Any) -> None:
        verdict = None
        try:
            verdict = None if ask.command.script is _CLEAR else _read(answer)
        except BadKey:
            self._clear(ask.key)
        except RedisAway as away:
            self._leave(str(away))
        if not ask.answer.done():
            ask.answer.set_result(verdict)
        elif verdict is not None and verdict.admitted and not ask.answer.cancelled():
            self._owed.add(ask.key, -ask.cost)  # it was let go, and counted all the same

    def _pay(self) -> None:
        """Have Redis count what was admitted without it. Sent with the next bundle, awaited by none."""
        for key, cost in self._owed.take().items():
            if cost > 0 and len(self._waiting) < MAX_WAITING:
                nobody = asyncio.get_running_loop().create_future()
                self._waiting.append(_Ask(key, 0, _SPEND.call(_keys(key), (_NO_LIMIT, WINDOW_S, cost)), nobody))

    def _clear(self, key: str) -> None:
        """What a key holds is not ours; the count begins anew. Sent with the next bundle, awaited by none."""
        nobody = asyncio.get_running_loop().create_future()
        self._waiting.append(_Ask(key, 0, _CLEAR.call(_keys(key), ()), nobody))

    def _let_go(self, asks: list[_Ask]) -> None:
        for ask in asks:
            if not ask.answer.done():
                ask.answer.set_result(None)

    def _leave(self, reason: str) -> None:
        """Ask Redis no more until it answers probes."""
        if self.is_away:
            return
        self.is_away = True
        self._let_go(self._waiting)
        self._waiting = []
        _LOGGER.warning("limits are counted by each worker alone: Redis is away (%s)", reason)
        self._on_change(True)
        self._prober = asyncio.get_running_loop().create_task(self._return())

    async def _return(self) -> None:
        good = 0
        while good < GOOD_PROBES:
            await asyncio.sleep(self._probe_period_s)
            good = good + 1 if await self._probe() else 0
        self.is_away = False
        _LOGGER.warning("limits are counted in Redis again")
        self._on_change(False)

    async def _probe(self) -> bool:
        """Whether Redis counts, not merely answers: a full one, or a copy that may not be written, does not."""
        keys = _keys(_PROBE_KEY)
        try:
            await self._link.ask([Command(None, ("PING",))], CONNECT_TIMEOUT_S)  # on an open line only time tells
            [answer] = await self._link.ask([_SPEND.call(keys, (_NO_LIMIT, WINDOW_S, 1))], self._timeout_s)
            _read(answer)
        except BadKey:
            with suppress(RedisAway):
                await self._link.ask([_CLEAR.call(keys, ())], self._timeout_s)
            return False
        except RedisAway:
            return False
        return True


class SharedLimiter:
    """The limit of one policy over shared counters, with a local one beside it for when they do not tell.

    Whatever is admitted is counted locally as well: when Redis goes, each worker goes on from what it admitted. And
    what Redis told last of an account still holds, as it fades: who had spent everything has not got a part of it anew.

    Args:
        counters: In Redis.
        local: This worker's part of the limit.
        limit: Units per minute, of all workers together.
        policy: Name in headers and keys.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        counters: SharedCounters,
        local: LocalLimiter,
        *,
        limit: int,
        policy: str = "predict",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._local = local
        self._limit = limit
        self._policy = policy
        self._clock = clock
        self._told: dict[str, tuple[Spent, float]] = {}

    async def spend(self, account: str, cost: int) -> Allowance:
        """Count `cost` units against the account, or refuse and count nothing."""
        verdict = await self._counters.spend(f"{self._policy}/{account}", self._limit, cost)
        if verdict is None:
            return await self._spend_alone(account, cost)
        admitted, spent = verdict
        self._remember(account, spent)
        if admitted:
            self._local.record(account, cost)
        wait_s = spent.left_s if admitted else spent.wait_s(self._limit - cost)
        remaining = max(0, self._limit - spent.used)
        return Allowance(admitted, self._limit, WINDOW_S, remaining, max(1, math.ceil(wait_s)), self._policy, "shared")

    async def _spend_alone(self, account: str, cost: int) -> Allowance:
        spent = self._recall(account)
        if spent is not None and spent.used + cost > self._limit:
            return self._local.refuse(spent.wait_s(self._limit - cost))
        allowance = await self._local.spend(account, cost)
        if allowance.admitted:
            self._counters.owe(f"{self._policy}/{account}", cost)
            if spent is not None:
                self._remember(account, spent._replace(current=spent.current + cost))
        return allowance

    def _recall(self, account: str) -> Spent | None:
        """What Redis told last of the account, as it has faded since."""
        if (told := self._told.get(account)) is None:
            return None
        spent, told_at = told
        return spent.after(self._clock() - told_at)

    def _remember(self, account: str, spent: Spent) -> None:
        if len(self._told) >= MAX_TOLD and account not in self._told:
            self._told.clear()  # a help, not the count itself
        self._told[account] = spent, self._clock()


def _keys(key: str) -> tuple[str, str]:
    """The library's names for the last and this fixed window; the braces keep both on one node of a cluster."""
    return f"{_KEY_PREFIX}{{{key}}}/-1", f"{_KEY_PREFIX}{{{key}}}"


def _read(answer: Any) -> Verdict:
    """The script's answer. Raises `RedisAway`, `BadKey`."""
    if isinstance(answer, RedisAway):
        raise answer
    try:
        admitted, previous, previous_ttl_ms, current, current_ttl_ms = answer
        previous, current = int(previous or 0), int(current or 0)
    except (TypeError, ValueError):
        raise BadKey("a key holds something else") from None
    if previous < 0 or current < 0 or -1 in {previous_ttl_ms, current_ttl_ms}:  # -1: it would never be forgotten
        raise BadKey("a key holds what was never counted")
    left_s = current_ttl_ms / 1000 - WINDOW_S  # the library's counters live for two windows
    return Verdict(admitted == 1, Spent(previous, current, max(0.0, left_s)))
