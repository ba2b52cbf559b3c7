"""Limits counted in a real Redis, and everything that can be wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.rate_limit import Allowance, Quota
from app.rate_limit.memory import LocalLimiter, MinuteCounters
from app.rate_limit.shared import DOUBT_AFTER_S, MAX_BUNDLE, SPEND, TIMEOUT_S, SharedCounters, SharedLimiter
from app.shared.address import parse_redis_url
from app.shared.commands import Command, Script
from app.shared.link import RedisLink
from tests.faults.toxic import CLEAN, ToxicProxy, Toxics
from tests.integration.processes import ROOT
from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.integration

LIMIT = 100
WORKERS = 2
KEY = "sluice:limit:predict/desk"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


class Worker:
    """What one gateway process does to keep a limit."""

    def __init__(self, url: str, probe_period_s: float, limit: int = LIMIT) -> None:
        self.changes: list[bool] = []
        self.counters = SharedCounters(
            RedisLink(parse_redis_url(url)), on_change=self.changes.append, probe_period_s=probe_period_s
        )
        local = LocalLimiter(MinuteCounters(), quota=Quota(limit // WORKERS), mode="local")
        self._limiter = SharedLimiter(self.counters, local, quota=Quota(limit))

    async def spend(self, cost: int = 1, account: str = "desk") -> Allowance:
        return await self._limiter.spend(account, cost)

    async def timed(self) -> tuple[str, float]:
        began = time.perf_counter()
        allowance = await self.spend()
        return allowance.mode, time.perf_counter() - began

    async def settled(self, *, away: bool, within_s: float = 5.0) -> None:
        async with asyncio.timeout(within_s):
            while self.counters.is_away != away:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def worker_on(url: str, probe_period_s: float = 0.05, limit: int = LIMIT) -> AsyncIterator[Worker]:
    worker = Worker(url, probe_period_s, limit)
    await worker.counters.start()
    try:
        yield worker
    finally:
        await worker.counters.stop()


async def test_two_workers_admit_the_limit_between_them_and_a_third_started_later_nothing(redis: RedisServer) -> None:
    async with worker_on(redis.url) as one, worker_on(redis.url) as two:
        spent = await asyncio.gather(*(worker.spend() for _ in range(LIMIT) for worker in (one, two)))
        assert sum(allowance.admitted for allowance in spent) == LIMIT
        assert {allowance.mode for allowance in spent} == {"shared"}
    async with worker_on(redis.url) as restarted:
        assert not (await restarted.spend()).admitted


async def test_what_is_told_of_the_quota_is_what_redis_holds(redis: RedisServer) -> None:
    async with worker_on(redis.url) as worker:
        await worker.spend(60)
        allowance = await worker.spend(30)
        assert (allowance.admitted, allowance.limit, allowance.remaining) == (True, LIMIT, 10)
        refused = await worker.spend(11)
        assert (refused.admitted, refused.remaining) == (False, 10)
        assert 55 <= refused.reset_s <= 70  # all of it was spent just now; a second later nearly a window is left
        assert (await worker.spend(10)).admitted
        assert (await worker.spend(10, account="other")).remaining == 90


async def test_absent_at_the_start_redis_is_waited_for_by_nobody_and_used_when_it_comes(redis: RedisServer) -> None:
    redis.kill()
    began = time.perf_counter()
    async with worker_on(redis.url, probe_period_s=0.5) as worker:
        mode, _ = await worker.timed()
        assert mode == "local"
        assert time.perf_counter() - began < 0.5
        redis.start()
        await worker.settled(away=False, within_s=5)
        assert (await worker.spend()).mode == "shared"


async def test_killed_redis_fails_no_request_and_is_used_again_within_five_seconds(redis: RedisServer) -> None:
    async with worker_on(redis.url, probe_period_s=0.5) as worker:
        assert (await worker.spend(10)).mode == "shared"
        redis.kill()
        modes = {(await worker.timed())[0] for _ in range(20)}
        assert modes == {"local"}
        redis.start()
        await worker.settled(away=False, within_s=5)
        assert (await worker.spend()).mode == "shared"
        assert worker.changes == [True, False]


async def test_hung_redis_costs_three_requests_fifty_milliseconds_and_the_others_next_to_nothing(
    redis: RedisServer,
) -> None:
    async with worker_on(redis.url, limit=100_000) as worker:
        await asyncio.gather(*(worker.spend() for _ in range(64)))
        redis.hang()
        try:
            first = await asyncio.gather(*(worker.timed() for _ in range(64)))
            later = [await worker.timed() for _ in range(200)]
        finally:
            redis.resume()
        assert {mode for mode, _ in first + later} == {"local"}
        assert sum(seconds > 0.04 for _, seconds in first + later) <= 3
        assert max(seconds for _, seconds in first) < 0.15  # 0.05, and a margin for a busy machine
        await worker.settled(away=False)
        assert (await worker.spend()).mode == "shared"


async def test_what_was_admitted_without_redis_is_counted_there_afterwards(redis: RedisServer) -> None:
    async with worker_on(redis.url) as worker:
        await worker.spend(10)
        redis.hang()
        try:
            assert [(await worker.spend(10)).admitted for _ in range(5)] == [True] * 4 + [False]  # of its part, 50
        finally:
            redis.resume()
        await worker.settled(away=False)
        assert (await worker.spend()).mode == "shared"
        async with asyncio.timeout(5):
            while (allowance := await worker.spend()).remaining > LIMIT - 50:
                await asyncio.sleep(0.01)
        assert allowance.mode == "shared"
    async with worker_on(redis.url) as other:
        assert not (await other.spend(LIMIT - 45)).admitted


async def test_one_request_after_the_other_no_more_than_three_wait_for_a_hung_redis(redis: RedisServer) -> None:
    async with worker_on(redis.url) as worker:
        await worker.spend()
        redis.hang()
        try:
            seconds = [(await worker.timed())[1] for _ in range(20)]
        finally:
            redis.resume()
        assert sum(each > 0.01 for each in seconds) <= 3


@pytest.mark.parametrize(
    "toxics", [Toxics(latency_s=0.2), Toxics(blackhole=True), Toxics(reset=True), Toxics(limit_bytes=7)]
)
async def test_a_bad_network_is_an_outage_until_it_is_good_again(redis: RedisServer, toxics: Toxics) -> None:
    with contextlib.closing(ToxicProxy(redis.port)) as proxy:
        async with worker_on(f"redis://127.0.0.1:{proxy.port}") as worker:
            assert (await worker.spend()).mode == "shared"
            proxy.toxics = toxics
            timed = [await worker.timed() for _ in range(20)]
            assert timed[-1][0] == "local"
            assert sum(seconds > 0.02 for _, seconds in timed) <= 3
            await asyncio.sleep(0.6)
            assert worker.counters.is_away
            proxy.toxics = CLEAN
            await worker.settled(away=False)
            assert (await worker.spend()).mode == "shared"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        (("CONFIG", "SET", "requirepass", "another"), None),
        (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
    ],
    ids=["full", "a copy that may not be written", "another password", "too few replicas"],
)
async def test_redis_that_answers_but_does_not_count_is_an_outage(
    redis: RedisServer, before: tuple[str, ...], after: tuple[str, ...] | None
) -> None:
    async with worker_on(redis.url) as worker:
        assert (await worker.spend()).mode == "shared"
        redis.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # passwords are asked of new connections
        assert redis.say(*before).startswith("+OK")
        assert (await worker.spend()).mode == "local"
        await asyncio.sleep(0.3)
        assert worker.counters.is_away
        if after is not None:
            assert redis.say(*after).startswith("+OK")
            await worker.settled(away=False)
            assert (await worker.spend()).mode == "shared"


@pytest.mark.parametrize(
    "write",
    [
        ("SET", "KEY", "garbage"),
        ("LPUSH", "KEY", "a"),
        ("HSET", "KEY", "a", "b"),
        ("HSET", "KEY", "NOW", "-7"),
        ("HSET", "KEY", "NOW", "1e3"),
        ("HSET", "KEY", "NOW", "99999999999999999999"),
        ("HSET", "KEY", "99999999999999999999", "1"),
    ],
    ids=["a text", "a list", "no second", "a negative number", "a float", "a huge number", "a second that never comes"],
)
async def test_a_wrong_value_costs_nobody_anything_and_is_mended(redis: RedisServer, write: tuple[str, ...]) -> None:
    async with worker_on(redis.url) as worker:
        words = {"KEY": KEY, "NOW": str(int(time.time()))}
        redis.say(*(words.get(word, word) for word in write))
        allowances = [await worker.spend() for _ in range(4)]
        assert {(allowance.admitted, allowance.mode) for allowance in allowances} == {(True, "shared")}
        assert allowances[-1].remaining == LIMIT - 4
        assert not worker.counters.is_away
        assert 1 <= int(redis.say("TTL", KEY)[1:]) <= 62


class SetClock:
    """Redis' counting by a clock that is set by hand."""

    def __init__(self, redis: RedisServer) -> None:
        self.now = 1_000_000_000.0
        self._link = RedisLink(parse_redis_url(redis.url))
        read_clock = "redis.call('TIME')"
        assert read_clock in SPEND.text
        self._script = Script(SPEND.text.replace(read_clock, "{ARGV[3], ARGV[4]}"))

    async def spend(self, account: str, limit: int, cost: int) -> tuple[bool, int, int]:
        """Whether it was admitted, what remains, and seconds until some is back."""
        second, microseconds = divmod(round(self.now * 1e6), 10**6)
        [answer] = await self._link.ask([self._script.call([account], (limit, cost, second, microseconds))], 5.0)
        admitted, used, wait_ms, _ = answer
        return admitted == 1, max(0, limit - used), math.ceil(wait_ms / 1000)

    async def close(self) -> None:
        await self._link.close()


@pytest.fixture
async def set_clock(redis: RedisServer) -> AsyncIterator[SetClock]:
    clock = SetClock(redis)
    yield clock
    await clock.close()


def worst_minute(admitted: list[tuple[float, int]]) -> int:
    """Most units in any 60 seconds."""
    return max(sum(units for at, units in admitted if began <= at < began + 60) for began, _ in admitted)


async def test_a_load_made_to_meet_the_edge_of_a_window_gets_the_limit_in_its_worst_minute(set_clock: SetClock) -> None:
    admitted = []
    began = set_clock.now

    async def take(units: int) -> bool:
        is_admitted, _, _ = await set_clock.spend("desk", 1000, units)
        if is_admitted:
            admitted.append((set_clock.now, units))
        return is_admitted

    await take(1)
    set_clock.now = began + 59.8  # nearly everything at the end of what might be a fixed window
    while await take(50) or await take(1):
        pass
    while set_clock.now < began + 180:  # and whatever fades, at once
        set_clock.now += 0.25
        while await take(1):
            pass
    assert worst_minute(admitted) <= 1000
    assert sum(units for _, units in admitted) >= 2000  # and all of it comes back


async def test_redis_and_a_worker_alone_count_the_same(set_clock: SetClock) -> None:
    chance = random.Random(7)
    for run in range(20):
        local = LocalLimiter(MinuteCounters(lambda: set_clock.now), quota=Quota(50))
        for _ in range(60):
            set_clock.now += chance.choice((0.0, chance.uniform(0, 2), chance.uniform(0, 80)))
            cost = chance.randint(1, 60)
            alone = await local.spend(f"{run}", cost)
            assert await set_clock.spend(f"{run}", 50, cost) == (alone.admitted, alone.remaining, alone.reset_s)


async def test_a_clock_that_is_set_back_frees_nothing_and_locks_nobody_out(set_clock: SetClock) -> None:
    assert await set_clock.spend("desk", 100, 90) == (True, 10, 61)
    set_clock.now -= 3600
    assert await set_clock.spend("desk", 100, 20) == (False, 10, 61)
    set_clock.now += 30
    assert await set_clock.spend("desk", 100, 10) == (True, 0, 31)
    set_clock.now += 31.5
    assert await set_clock.spend("desk", 100, 90) == (True, 0, 30)


async def test_four_hundred_busy_accounts_at_once_are_asked_in_bundles_far_below_the_deadline(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each account has spent something in each of the last sixty seconds: the script has the most to do."""
    async with worker_on(redis.url) as worker:
        now = int(time.time())
        busy = [word for second in range(now - 60, now + 1) for word in (str(second), "1")]
        link = worker.counters._link
        keys = [f"sluice:limit:predict/desk-{number}" for number in range(400)]
        for key in keys:
            await link.ask([Command(None, ("HSET", key, *busy))], 1.0)
        sizes: list[int] = []

        async def ask_counted(commands: Sequence[Command], timeout_s: float) -> list[Any]:
            sizes.append(len(commands))
            return await ask(commands, timeout_s)

        ask = link.ask
        monkeypatch.setattr(link, "ask", ask_counted)
        await asyncio.gather(*(worker.spend(account=f"desk-{number}") for number in range(400)))
        assert max(sizes) == MAX_BUNDLE
        [told] = await ask([Command(None, ("INFO", "commandstats"))], 1.0)
    [usec] = re.findall(rb"cmdstat_evalsha:.*?usec_per_call=([0-9.]+)", told)
    bundle_s = 1e-6 * float(usec) * MAX_BUNDLE
    print(f"{float(usec):.0f} us for a busy account, {1e3 * bundle_s:.1f} ms for a bundle")
    assert bundle_s < (TIMEOUT_S - DOUBT_AFTER_S) / 2


async def test_forgotten_scripts_and_keys_are_no_outage(redis: RedisServer) -> None:
    async with worker_on(redis.url, limit=100_000) as worker:

        async def forget() -> None:
            for word in ("SCRIPT", "FLUSHALL") * 20:
                await asyncio.to_thread(redis.say, word, *(["FLUSH"] if word == "SCRIPT" else []))

        async def spend() -> set[str]:
            return {(await worker.spend()).mode for _ in range(300)}

        modes, *_ = await asyncio.gather(spend(), spend(), forget())
        assert modes == {"shared"}


async def test_a_socket_and_a_password_from_a_file_that_changes(tmp_path: Path) -> None:
    passwords = [b"first-password"]
    with RedisServer(tmp_path, "first-password") as redis:
        link = RedisLink(parse_redis_url(f"unix://{redis.socket}?db=3"), password=lambda: passwords[-1])
        counters = SharedCounters(link, probe_period_s=0.05)
        await counters.start()
        assert not counters.is_away
        redis.kill()
        assert await counters.spend("a", 10, 1) is None
        passwords.append(b"second-password")
        with RedisServer(tmp_path, "second-password"):
            async with asyncio.timeout(5):
                while counters.is_away:
                    await asyncio.sleep(0.01)
        await counters.stop()


@contextlib.asynccontextmanager
async def behind_tls(redis: RedisServer, certificates: Path) -> AsyncIterator[int]:
    """The port on which Redis is reached by TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "edge.crt", certificates / "edge.key")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            upstream = await asyncio.open_connection("127.0.0.1", redis.port)
            await asyncio.gather(carry(reader, upstream[1]), carry(upstream[0], writer))

    server = await asyncio.start_server(join, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_by_tls_redis_is_believed_only_with_the_right_name_and_certificate(
    redis: RedisServer, tmp_path: Path
) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
        subprocess.run([ROOT / "docker/edge/make-certificate.sh", tmp_path / folder, "localhost"], check=True)
    async with behind_tls(redis, tmp_path / "ours") as port:
        for host, authority, is_believed in (
            ("localhost", "ours", True),
            ("localhost", "theirs", False),
            ("127.0.0.1", "ours", False),
            ("localhost", None, False),
        ):
            ca_file = None if authority is None else str(tmp_path / authority / "edge_ca.crt")
            counters = SharedCounters(RedisLink(parse_redis_url(f"rediss://{host}:{port}"), ca_file=ca_file))
            await counters.start()
            assert (await counters.spend("a", 10, 1) is not None) == is_believed, (host, authority)
            await counters.stop()


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n" * 9, b"*-7\r\n", b"\0\xff\r\n", b""])
async def test_who_speaks_no_redis_is_an_outage(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read(10)
            writer.write(said)
            await writer.drain()
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with worker_on(f"redis://127.0.0.1:{port}", probe_period_s=0.01) as worker:
            modes = set()
            for _ in range(10):
                modes.add((await worker.spend()).mode)
                await asyncio.sleep(0.01)
            assert modes == {"local"}
