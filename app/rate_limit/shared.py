"""Limits counted in Redis for all workers and gateways, and by each alone while Redis is away.

Redis counts as `MinuteCounters` does, by seconds and so that no minute is overspent, with a script of our own. Of the
ways of the library `limits` its moving window keeps an entry per unit and believes the clients' clocks, and its
sliding-window counter takes the last window for evenly spent, which lets nearly twice the limit through in the worst
minute.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from app.rate_limit import WINDOW_S, Allowance, Quota
from app.rate_limit.memory import LocalLimiter, MinuteCounters
from app.shared.commands import Command, Link, RedisAway, Script

_LOGGER = logging.getLogger(__name__)

TIMEOUT_S = 0.05
DOUBT_AFTER_S = 0.015
PROBE_PERIOD_S = 0.5
CONNECT_TIMEOUT_S = 0.5  # nobody waits for it but the probes, and TLS and names take their time
GOOD_PROBES = 2
MAX_LATE = 3
MAX_BUNDLE = 64  # the script takes up to 0.1 ms for a busy account: far below what a bundle is waited for
MAX_WAITING = 1024
MAX_TOLD = 10_000

_KEY_PREFIX = "sluice:limit:"
_PROBE_KEY = "probe"
_NO_LIMIT = 1 << 50
_MAX_TEXT_BYTES = 2048  # of 61 seconds with 16 digits each, and some air

# A key is a hash of the units spent in each second of Redis' clock. A second counts until all of it is a whole window
# ago. What seems to be spent later than now was spent before the clock was set back; it counts as spent now. A key
# with anything else in it begins anew.
SPEND = Script(
    f"""
local limit, cost, window = tonumber(ARGV[1]), tonumber(ARGV[2]), {WINDOW_S}
local clock = redis.call('TIME')
local now, ms = tonumber(clock[1]), math.floor(clock[2] / 1000)
local spent, used, early, dropped = {{}}, 0, 0, {{}}
local find = string.find

local fields = redis.pcall('HGETALL', KEYS[1])
local is_ours = not fields.err
for i = 1, #fields, 2 do
    local second, amount = tonumber(fields[i]), tonumber(fields[i + 1])
    if not (second and second < 1e15 and amount and amount < 1e15) or find(fields[i + 1], '%D') then
        is_ours = false
        break
    end
    if second > now - window - 1 and second <= now then
        spent[second] = amount
        used = used + amount
    else
        dropped[#dropped + 1] = fields[i]
        early = early + (second > now and amount or 0)
    end
end
if not is_ours then
    redis.call('DEL', KEYS[1])
    spent, used, early, dropped = {{}}, 0, 0, {{}}
end

used = used + early
local admitted = used + cost <= limit
local added = early + (admitted and cost or 0)
if added > 0 then
    redis.call('HINCRBY', KEYS[1], clock[1], string.format('%.0f', added))
    redis.call('EXPIRE', KEYS[1], window + 2)
    spent[now] = (spent[now] or 0) + added
    used = used + (admitted and cost or 0)
end
if #dropped > 0 then
    redis.call('HDEL', KEYS[1], unpack(dropped))
end

local room = admitted and used - 1 or limit - cost
local left, wait_ms, told = used, window * 1000, {{}}
for second = now - window, now do
    if spent[second] then
        local left_ms = (second + window + 1 - now) * 1000 - ms
        if left > room and left - spent[second] <= room then
            wait_ms = left_ms
        end
        left = left - spent[second]
        told[#told + 1] = left_ms .. ':' .. spent[second]
    end
end
return {{admitted and 1 or 0, used, wait_ms, table.concat(told, ',')}}
"""
)


class Spent:
    """What counted against an account when Redis told it, and what of that counts later.

    Args:
        text: `LEFT_MS:UNITS` for each second in which units were spent, oldest first: how long they counted yet.
        told_at: When, by the clock that later moments are taken from.
    """

    __slots__ = ("_seconds", "_text", "_told_at")

    def __init__(self, text: bytes, told_at: float) -> None:
        self._text = text
        self._told_at = told_at
        self._seconds: list[tuple[float, int]] | None = None  # until when, and how many; most are never looked at

    def used(self, now: float) -> int:
        """Units that count now."""
        return sum(units for _, units in self._counting(now))

    def wait_s(self, room: int, now: float) -> float:
        """Seconds until at most `room` units count."""
        left = self.used(now)
        for until, units in self._counting(now):
            left -= units
            if left <= room:
                return until - now
        return WINDOW_S  # more than the whole limit: no wait would help

    def add(self, units: int, now: float) -> None:
        """Count more, as spent now."""
        self._counting(now).append((now + WINDOW_S, units))

    def _counting(self, now: float) -> list[tuple[float, int]]:
        seconds = self._read() if self._seconds is None else self._seconds
        self._seconds = [(until, units) for until, units in seconds if until > now]
        return self._seconds

    def _read(self) -> list[tuple[float, int]]:
        try:
            pairs = [second.split(b":") for second in self._text.split(b",") if second]
            return [(self._told_at + int(left_ms) / 1000, int(units)) for left_ms, units in pairs]
        except ValueError:
            return []  # none of our script's; it is a help, not the count itself


class Verdict(NamedTuple):
    """What Redis made of a request.

    Attributes:
        admitted: Whether it was counted.
        used: Units that count now.
        wait_s: Seconds until some of them are back, or a refused request would be admitted.
        text: As `Spent` reads it.
    """

    admitted: bool
    used: int
    wait_s: float
    text: bytes


class _Ask(NamedTuple):
    key: str
    cost: int
    command: Command
    answer: asyncio.Future[Verdict | None]
    asked_at: float
    is_debt: bool = False  # nobody waits for it


class SharedCounters:
    """The counters in Redis, asked for many requests at once; never waited for when Redis is away, hung or wrong.

    What is asked while a bundle is under way goes with the next one, or with a later one where many ask; who would wait
    too long for that is let go. A bundle that takes long is waited for by its
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
        self._clock = clock
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
        ask = _Ask(key, cost, _spend(key, limit, cost), loop.create_future(), self._clock())
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
                self._bundle, self._waiting = self._waiting[:MAX_BUNDLE], self._waiting[MAX_BUNDLE:]
                await self._send(self._bundle)
                self._let_go_of_late()
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

    def _let_go_of_late(self) -> None:
        """Who has waited for bundles of others for as long as for a slow one of his own waits no more."""
        since = self._clock() - self._doubt_after_s
        if self._waiting and self._waiting[0].asked_at < since:
            self._let_go([ask for ask in self._waiting if not ask.is_debt and ask.asked_at < since])
            self._waiting = [ask for ask in self._waiting if ask.is_debt or ask.asked_at >= since]

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
            verdict = _read(answer)
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
                self._waiting.append(_Ask(key, 0, _spend(key, _NO_LIMIT, cost), nobody, self._clock(), is_debt=True))

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
        try:
            await self._link.ask([Command(None, ("PING",))], CONNECT_TIMEOUT_S)  # on an open line only time tells
            [answer] = await self._link.ask([_spend(_PROBE_KEY, _NO_LIMIT, 1)], self._timeout_s)
            _read(answer)
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
        quota: Units per minute of each account, of all workers together.
        policy: Name in headers and keys.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        counters: SharedCounters,
        local: LocalLimiter,
        *,
        quota: Quota,
        policy: str = "predict",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._local = local
        self._quota = quota
        self._policy = policy
        self._clock = clock
        self._told: dict[str, Spent] = {}

    async def spend(self, account: str, cost: int) -> Allowance:
        """Count `cost` units against the account, or refuse and count nothing."""
        limit = self._quota.of(account)
        verdict = await self._counters.spend(f"{self._policy}/{account}", limit, cost)
        if verdict is None:
            return await self._spend_alone(account, cost)
        self._remember(account, verdict.text)
        if verdict.admitted:
            self._local.record(account, cost)
        return Allowance(
            verdict.admitted,
            limit,
            WINDOW_S,
            max(0, limit - verdict.used),
            max(1, math.ceil(verdict.wait_s)),
            self._policy,
            "shared",
        )

    async def _spend_alone(self, account: str, cost: int) -> Allowance:
        now, limit = self._clock(), self._quota.of(account)
        spent = self._told.get(account)
        if spent is not None and spent.used(now) + cost > limit:
            return self._local.refuse(account, spent.wait_s(limit - cost, now))
        allowance = await self._local.spend(account, cost)
        if allowance.admitted:
            self._counters.owe(f"{self._policy}/{account}", cost)
            if spent is not None:
                spent.add(cost, now)
        return allowance

    def _remember(self, account: str, text: bytes) -> None:
        if len(self._told) >= MAX_TOLD and account not in self._told:
            self._told.clear()  # a help, not the count itself
        self._told[account] = Spent(text, self._clock())


def _spend(key: str, limit: int, cost: int) -> Command:
    return SPEND.call([_KEY_PREFIX + key], (limit, cost))


def _read(answer: Any) -> Verdict:
    """The script's answer. Raises `RedisAway`."""
    if isinstance(answer, RedisAway):
        raise answer
    match answer:
        case [0 | 1 as admitted, int(used), int(wait_ms), bytes(text)] if used >= 0 and len(text) <= _MAX_TEXT_BYTES:
            return Verdict(admitted == 1, used, wait_ms / 1000, text)
    raise RedisAway("no answer of the script")
