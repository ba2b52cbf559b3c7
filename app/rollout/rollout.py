"""The record in force: read from memory on the request path, written through to the store, and read from it again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from app.rollout.audit import Action, AuditLog, AuditRefused, Change
from app.rollout.moves import MoveRefused, grows
from app.rollout.record import Record, parse_record
from app.rollout.state import StateAway, StateConflict, StateDoubtful, StateStore, StateUnreadable

_LOGGER = logging.getLogger(__name__)

DOCUMENT = "rollout"

# A share that is to shrink waits so long for its store: Redis answers or is away within that, and a disk may hang.
_RETREAT_S = 0.9
_MAX_ACCOUNTS = 20  # that a record of the audit log names


class NotStored(Exception):
    """The change is in force in this process, but will not outlive it."""


def check_document(name: str, document: dict[str, Any]) -> None:
    """The stores' check: raises `ValueError` for a rollout that is no record."""
    if name == DOCUMENT:
        parse_record(document)


class Rollout:
    """Which arms are in force, and who gets which.

    Args:
        store: Where the record outlives the process.
        initial: Record to start with where the store holds none.
        audit: Where every change is recorded; None for nowhere.
        announce: Told of every change that was made here.
        on_record: Told of the record whenever another one comes into force here, whoever made it.
        refresh_period_s: Seconds between looks at a store that others write to; None for one that is ours alone.
    """

    def __init__(
        self,
        store: StateStore,
        *,
        initial: Record,
        audit: AuditLog | None = None,
        announce: Callable[[Change], None] = lambda change: None,
        on_record: Callable[[Record], None] = lambda record: None,
        refresh_period_s: float | None = None,
    ) -> None:
        self._store = store
        self._audit = audit
        self._announce = announce
        self._on_record = on_record
        self._refresh_period_s = refresh_period_s
        self._version = 0
        self._refusal = ""
        self._changing = asyncio.Lock()
        self._late: set[asyncio.Task[None]] = set()  # records and writes that nobody waits for any more
        self._refresher: asyncio.Task[None] | None = None
        self.record = initial

    async def start(self) -> None:
        """Take over what the store holds, and then whatever others write. Raises `StateUnreadable`."""
        await self.load()
        self._on_record(self.record)  # that of the settings was in force before anybody was told
        if self._refresh_period_s is not None:
            self._refresher = asyncio.create_task(self._refresh(self._refresh_period_s))

    async def stop(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        await self._store.close()

    async def load(self) -> None:
        """Take over what the store holds, unless that is older. Raises `StateUnreadable`, `StateAway`."""
        stored = await self._store.read(DOCUMENT)
        if stored is None or stored.version < self._version:
            return
        try:
            record = parse_record(stored.document)
        except ValueError as error:
            raise StateUnreadable("the stored rollout is none of ours; set it anew or delete it") from error
        old, seen_before = self.record, self._version
        self._put(record, stored.version)
        if record != old and seen_before and self._audit is not None:
            await self._audit.note(_change("seen", old, record, {}, stored.version))

    async def change(
        self, move: Callable[[Record], Record], action: Action = "share", evidence: Mapping[str, Any] | None = None
    ) -> Record:
        """Make a move and return the record that is in force then.

        What moves somebody to a canary is recorded and stored first, or not done. What moves nobody there, a rollback
        above all, is in force within a second whatever the disk does: where it is not stored by then, the caller is
        told.

        Args:
            move: From the record in force to the next; asked again where somebody else was quicker.
            action: What it is, for the audit log.
            evidence: JSON-ready, by what it was decided.

        Raises:
            MoveRefused: The move says so, or a share was to grow and the change could not be recorded.
            NotStored: It is in force until this process ends, or until a slow disk has it after all.
            StateAway: The store cannot be reached, or `StateDoubtful`: it was lost meanwhile.
            StateConflict: Others changed it at the same time, and twice.
            StateUnreadable, OSError: The store could not be read or written.
        """
        async with self._changing:
            try:
                return await self._make(move, action, evidence or {})
            except StateConflict:
                await self.load()
                return await self._make(move, action, evidence or {})

    async def _make(self, move: Callable[[Record], Record], action: Action, evidence: Mapping[str, Any]) -> Record:
        old = self.record
        new = move(old)
        version = self._version + 1
        change = _change(action, old, new, evidence, version)
        if grows(old, new):
            await self._grow(change, new, version)
        else:
            await self._retreat(change, new, version)
        return new

    async def _grow(self, change: Change, new: Record, version: int) -> None:
        if self._audit is not None:
            try:
                await self._audit.append(change)
            except AuditRefused as refused:
                if str(refused) != self._refusal:  # a controller tries again and again
                    _LOGGER.error("nothing was changed, since it cannot be recorded: %s", refused)
                self._refusal = str(refused)
                raise MoveRefused("the change cannot be recorded, and no share grows without its record") from None
            self._refusal = ""
        try:
            await self._store.write(DOCUMENT, new.document(), version)
        except BaseException as error:
            if self._audit is not None:
                end: Action = "doubtful" if isinstance(error, StateDoubtful) else "abandoned"
                await self._audit.note(Change(change.who, end, change.before, change.after, type(error).__name__))
            raise
        self._take(new, version)
        self._announce(change)

    async def _retreat(self, change: Change, new: Record, version: int) -> None:
        fault = ""
        written = self._aside(self._store.write(DOCUMENT, new.document(), version))
        await asyncio.wait({written}, timeout=_RETREAT_S)
        try:
            if written.done():
                written.result()
            else:
                fault = "the disk has not answered yet"
        except OSError as error:
            fault = error.strerror or "the disk refused it"
        self._take(new, version)
        self._announce(change)
        if self._audit is not None:
            recorded = self._aside(self._audit.note(change))
            await asyncio.wait({recorded}, timeout=_RETREAT_S)
        if fault:
            raise NotStored(fault)

    def _aside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin what goes on though nobody should wait for it any more."""
        task = asyncio.create_task(work)
        self._late.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._late.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOGGER.debug("a change was not stored: %s", error)  # who waited for it was told

    def _take(self, record: Record, version: int) -> None:
        if version > self._version:  # what others wrote meanwhile may have been read already
            self._put(record, version)

    def _put(self, record: Record, version: int) -> None:
        old, self.record, self._version = self.record, record, version
        if record != old:
            self._on_record(record)

    async def _refresh(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.load()
            except (StateAway, StateUnreadable, OSError) as error:  # the record stays as it is
                _LOGGER.debug("the rollout's state was not read: %s", error)
            except Exception:
                _LOGGER.exception("the rollout's state was not read, for a reason that was not foreseen")


def _change(action: Action, old: Record, new: Record, evidence: Mapping[str, Any], version: int) -> Change:
    """The audit log's record; all workers that see the same record come into force give it the same name."""
    digest = hashlib.sha256(json.dumps(new.document(), sort_keys=True).encode()).hexdigest()[:16]
    before, after = old.summary(), new.summary()
    accounts = sorted(dict(old.overrides.items() ^ new.overrides.items()))[:_MAX_ACCOUNTS]
    if accounts:
        before["accounts"], after["accounts"] = ({a: r.overrides.get(a) for a in accounts} for r in (old, new))
    if new.run is not None and (old.run is None or old.run.id != new.run.id):
        evidence = {**evidence, "plan": new.run.plan.model_dump(mode="json")}
    return Change(
        who=new.changed_by,
        action=action,
        before=before,
        after=after,
        why=new.reason,
        evidence=evidence,
        once=f"rollout {version} {digest}",
    )
