"""The kill switch: what is killed is refused by every worker of every gateway within a second.

    change ─► this worker's memory ─► the gateway's file ─► its other workers, which look four times a second
                                   └► Redis ─► the other gateways, which ask four times a second

Whatever is away or full, the way before it still works; what could not be told is told when it is there again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from app.rollout.audit import AuditLog, Change
from app.rollout.kill_places import KillFile, KillsUnreadable, SharedKills
from app.rollout.kills import MAX_KILLS, Entry, Key, Kills, Scope
from app.shared.commands import RedisAway

_LOGGER = logging.getLogger(__name__)

_LOOK_PERIOD_S = 0.25
_FILE_TIMEOUT_S = 0.5  # a disk that hangs must not keep a kill from the other gateways
_AUDIT_TIMEOUT_S = 1.0
_MOST_TRIES = 8  # of a write that others were quicker with

Reached = Literal[
    "all gateways", "this gateway", "this gateway: Redis is away", "this worker alone: the disk refused it"
]


class TooManyKills(Exception):
    """The table is full; what is killed one by one can be killed globally."""


@dataclass(frozen=True, slots=True)
class _InForce:
    """What is killed, in the form in which a request asks for it."""

    everything: bool
    models: frozenset[str]
    principals: frozenset[str]
    symbols: frozenset[str]

    @staticmethod
    def of(kills: Kills, *, is_blind: bool) -> _InForce | None:
        names: dict[Scope, set[str]] = {"global": set(), "model": set(), "principal": set(), "symbol": set()}
        for entry in kills.killed():
            names[entry.scope].add(entry.name)
        if not is_blind and not any(names.values()):
            return None
        principals, symbols = frozenset(names["principal"]), frozenset(names["symbol"])
        return _InForce(is_blind or bool(names["global"]), frozenset(names["model"]), principals, symbols)


class KillSwitch:
    """Tells of each request whether it is killed, and keeps what is killed in step with the other workers and gateways.

    A worker that starts and cannot read the gateway's file does not know what is killed, and takes everything for
    killed until it can. One that runs goes on with what it knows, and puts a good file in the bad one's place.

    Args:
        file: The gateway's own.
        shared: The table of all gateways; None where there is but this one.
        audit: Told of every change, and of what another gateway changed.
        wall_clock: Seconds since the epoch.
        show: Told how many kills there are of each scope, whenever that may have changed.
        announce: Told of every change that was made here, as an event for others.

    Attributes:
        epoch: Another number whenever something else is killed than before.
        is_thrown: Whether anything is killed.
    """

    def __init__(
        self,
        file: KillFile,
        shared: SharedKills | None,
        *,
        audit: AuditLog,
        wall_clock: Callable[[], float] = time.time,
        show: Callable[[Mapping[str, int]], None] = lambda _: None,
        announce: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.epoch = 0
        self.is_thrown = False
        self._file = file
        self._shared = shared
        self._audit = audit
        self._wall_clock = wall_clock
        self._show = show
        self._announce = announce
        self._kills = Kills()
        self._is_blind = False
        self._in_force: _InForce | None = None
        self._filed = Kills()  # as far as this worker knows
        self._stamp: bytes | None = None
        self._told = Kills()  # what Redis held when it had that stamp
        self._from_others: set[Key] = set()
        self._fault = ""
        self._filing = asyncio.Lock()
        self._sharing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        await self._look_at_file(is_first=True)
        await self._look_at_shared()
        for look in (self._look_at_file, self._look_at_shared):
            self._run(_again_and_again(look))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._shared is not None:
            await self._shared.close()

    def scope_killed(self, model: str, accounts: Collection[str], symbol: str | None) -> Scope | None:
        """The widest scope in which a request is killed, None where it is not.

        Args:
            model: That it asks for.
            accounts: `Principal.accounts` of who asks.
            symbol: Its tag, None where it has none.
        """
        now = self._in_force
        if now is None:
            return None
        if now.everything:
            return "global"
        if model in now.models:
            return "model"
        if not now.principals.isdisjoint(accounts):
            return "principal"
        return "symbol" if symbol in now.symbols else None

    async def change(self, scope: Scope, name: str, *, killed: bool, actor: str, reason: str) -> dict[str, Any]:
        """Kill something, or lift that; in force in this worker at once.

        Args:
            scope: Of the name.
            name: As `Entry`.
            killed: Whether to kill or to lift.
            actor: Subject of who asks for it.
            reason: Why.

        Returns:
            The entry, whom it has reached, and whether the disk keeps it; JSON-ready.

        Raises:
            ValueError: It is no entry.
            TooManyKills: There are a thousand others.
        """
        before = self._kills.get(Key(scope, name))
        # Who lifts a kill has seen it: their word is the later one, whatever their clock says.
        at = self._wall_clock() if before is None else max(self._wall_clock(), math.nextafter(before.at, math.inf))
        entry = Entry(scope, name, killed, actor, reason, at)
        is_new = killed and not (before is not None and before.killed)
        if is_new and scope != "global" and len(self._kills.killed()) >= MAX_KILLS:
            raise TooManyKills
        self._take([entry])
        is_kept = await self._within(_FILE_TIMEOUT_S, self._put_into_file())
        is_shared = await self._tell_shared()
        await self._record(entry, before)
        return {"entry": asdict(entry), "reached": self._reached(is_kept, is_shared), "kept": is_kept}

    def counts(self) -> dict[str, int]:
        """How many kills are in force, by scope."""
        counts = self._kills.counts()
        return {**counts, "global": 1} if self._is_blind else counts

    def document(self) -> dict[str, Any]:
        """What is killed, and what no longer is; JSON-ready."""
        return {
            "killed": [asdict(entry) for entry in self._kills.killed()],
            "lifted": [asdict(entry) for entry in self._kills.lifted()],
            "blind": self._is_blind,
        }

    def _reached(self, is_kept: bool, is_shared: bool) -> Reached:
        if is_shared:
            return "all gateways"
        if not is_kept:
            return "this worker alone: the disk refused it"
        return "this gateway" if self._shared is None else "this gateway: Redis is away"

    async def _record(self, entry: Entry, before: Entry | None) -> None:
        action: Literal["kill", "lift"] = "kill" if entry.killed else "lift"
        was = None if before is None else asdict(before)
        self._announce({"type": f"kill.{action}", "data": {"scope": entry.scope, "name": entry.name, "at": entry.at}})
        note = self._audit.note(Change(entry.actor, action, was, asdict(entry), entry.reason))
        await self._within(_AUDIT_TIMEOUT_S, note)

    def _take(self, entries: Iterable[Entry]) -> None:
        """Bring what is news into force."""
        kills = self._kills.merged(entries, self._wall_clock())
        in_force = _InForce.of(kills, is_blind=self._is_blind)
        self._kills = kills
        if in_force != self._in_force:
            self._in_force = in_force
            self.is_thrown = in_force is not None
            self.epoch += 1
        self._show(self.counts())

    async def _look_at_file(self, *, is_first: bool = False) -> None:
        try:
            found = await asyncio.to_thread(self._file.look)
        except KillsUnreadable as unreadable:
            self._tell_fault(str(unreadable))
            if is_first:
                self._is_blind = True
                self._take([])
            found = None
            if not self._is_blind:
                await self._put_into_file()
        else:
            self._tell_fault("")
            self._is_blind = False
        if found is not None:
            self._filed = found
            self._take(found)
        if not self._is_blind:
            if self._kills.beyond(self._filed):
                await self._put_into_file()
            await asyncio.to_thread(self._keep_spare)

    def _keep_spare(self) -> None:
        try:
            self._file.keep_spare()
        except OSError as error:
            _LOGGER.debug("no room is spared for kills: %s", error)

    async def _put_into_file(self) -> bool:
        """Have the file hold what is known here; whether it does now."""
        async with self._filing:
            try:
                merged, lacked = await asyncio.to_thread(
                    self._file.merge, self._kills, self._wall_clock(), replace_unreadable=not self._is_blind
                )
            except (OSError, KillsUnreadable) as error:
                self._tell_fault(f"kills are not kept: {error}")
                return False
            self._filed = merged
            self._take(merged)
            seen = [entry for entry in lacked if entry.key in self._from_others]
            self._from_others.clear()
        for entry in seen:  # the one worker that brought it into the file tells of it
            await self._audit.note(Change(entry.actor, "seen", None, asdict(entry), entry.reason))
        return True

    async def _look_at_shared(self) -> None:
        await self._tell_shared()

    async def _tell_shared(self) -> bool:
        """Have Redis and this worker know the same; whether they do now."""
        if self._shared is None:
            return False
        async with self._sharing:
            try:
                return await self._agree(self._shared)
            except RedisAway:
                return False

    async def _agree(self, shared: SharedKills) -> bool:
        for _ in range(_MOST_TRIES):
            if await shared.stamp() == self._stamp and not self._kills.beyond(self._told):
                return True
            stamp, self._told = await shared.read()
            self._stamp = stamp
            await self._take_from_others(self._told.beyond(self._kills))
            if not self._kills.beyond(self._told):
                return True
            ours = self._kills
            written = await shared.write(ours, stamp)
            if written is not None:
                self._stamp, self._told = written, ours
                return True
        return False

    async def _take_from_others(self, news: list[Entry]) -> None:
        if not news:
            return
        self._from_others.update(entry.key for entry in news)
        self._take(news)
        for entry in news:
            _LOGGER.warning("%s: %s by %s", "killed" if entry.killed else "lifted", entry.scope, entry.actor)
        await self._within(_FILE_TIMEOUT_S, self._put_into_file())

    async def _within(self, seconds: float, work: Awaitable[Any]) -> bool:
        """Whether the work was done in time; it goes on after that."""
        task = self._run(work)
        await asyncio.wait({task}, timeout=seconds)
        return task.done() and not task.cancelled() and task.exception() is None and task.result() is not False

    def _run(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell_fault(self, fault: str) -> None:
        if fault and fault != self._fault:
            _LOGGER.error("%s", fault)
        self._fault = fault


async def _again_and_again(look: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(_LOOK_PERIOD_S)
        try:
            await look()
        except Exception:
            _LOGGER.exception("looking for kills failed; it goes on")
