import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from app.files import locked
from app.rollout import moves
from app.rollout.audit import AuditLog, Change
from app.rollout.moves import By
from app.rollout.plan import Plan
from app.rollout.rollout import NotStored, Rollout, check_document
from app.rollout.state import FileStore, MemoryStore, StateDoubtful, StateStore, StateUnreadable
from tests.app.rollout.rollouts import record_of, rollout_over, set_share


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "state")


async def test_a_changed_share_is_in_force_and_survives_a_restart(store: StateStore) -> None:
    rollout = rollout_over(store, 1.0)
    await rollout.load()
    await set_share(rollout, 0.05, "ops-anna")
    assert rollout.record.share == 0.05

    restarted = rollout_over(store, 1.0)
    await restarted.load()
    assert (restarted.record.share, restarted.record.changed_at) == (0.05, 7.0)
    assert restarted.record.changed_by == "ops-anna"


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), float("inf")])
async def test_what_is_no_share_changes_nothing(store: StateStore, fraction: float) -> None:
    rollout = rollout_over(store, 0.3)
    with pytest.raises(ValueError, match="share"):
        await set_share(rollout, fraction, "ops-anna")
    assert rollout.record.share == 0.3


async def test_a_share_that_the_disk_refused_is_not_in_force(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "state")
    rollout = rollout_over(store, 0.3)
    (tmp_path / "state").rmdir()
    with pytest.raises(OSError, match="No such file"):
        await set_share(rollout, 0.9, "ops-anna")
    assert rollout.record.share == 0.3


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "0", "null", '{"ray_serve_fraction": 0.5, "version": true}'),
        *('{"ray_serve_fraction": 0.5, "version": 0}', '{"ray_serve_fraction": 0.5, "version": "2"}'),
        *('{"ray_serve_fraction": 2}', '{"share": 1}', "[" * 100_000, '{"ray_serve_fraction": 0.5, "version": 1e400}'),
        '{"ray_serve_fraction": 0.5, "changed_at": 1, "changed_by": "x", "version": 9007199254740993}',
        '{"ray_serve_fraction": true, "changed_at": 1, "changed_by": "x"}',
        '{"ray_serve_fraction": 0.5, "changed_at": NaN, "changed_by": "x"}',
        '{"ray_serve_fraction": 0.5, "changed_at": 1, "changed_by": []}',
    ],
)
async def test_a_damaged_file_is_named_and_never_guessed_at(tmp_path: Path, content: str) -> None:
    (tmp_path / "rollout.json").write_text(content)
    with pytest.raises(StateUnreadable):
        await rollout_over(FileStore(tmp_path), 1.0).load()


async def test_who_sets_the_share_last_wins_and_the_other_sees_it_with_the_next_look(store: StateStore) -> None:
    ann, ben = (rollout_over(store, 1.0) for _ in range(2))
    await set_share(ann, 0.1, "ann")
    await set_share(ben, 0.2, "ben")  # without having looked
    assert (ann.record.share, ben.record.share) == (0.1, 0.2)
    await ann.load()
    assert ann.record == ben.record
    await set_share(ann, 0.3, "ann")
    await ben.load()
    assert ben.record.share == 0.3


async def test_many_writers_at_once_lose_no_version(store: StateStore) -> None:
    rollouts = [rollout_over(store, 1.0) for _ in range(2)]
    await asyncio.gather(*(set_share(rollout, 0.5, "ann") for rollout in rollouts))
    stored = await store.read("rollout")
    assert stored is not None
    assert stored.version == 2


@pytest.mark.parametrize("content", ["{", '{"ray_serve_fraction": "x", "version": 9}'])
async def test_a_change_replaces_a_damaged_file(tmp_path: Path, content: str) -> None:
    rollout = rollout_over(FileStore(tmp_path, check_document), 1.0)
    await set_share(rollout, 0.5, "ann")
    (tmp_path / "rollout.json").write_text(content)
    await set_share(rollout, 0.25, "ann")
    restarted = rollout_over(FileStore(tmp_path, check_document), 1.0)
    await restarted.load()
    assert restarted.record.share == 0.25


async def test_of_two_documents_of_one_version_the_stored_one_is_in_force() -> None:
    store = MemoryStore()
    here = rollout_over(store, 1.0)
    await set_share(here, 0.1, "ann")
    forgetful = MemoryStore()
    await set_share(rollout_over(forgetful, 1.0), 0.9, "ben")
    store._stored = forgetful._stored
    await here.load()
    assert here.record.share == 0.9


async def test_what_another_process_writes_into_the_file_is_followed(tmp_path: Path) -> None:
    new = rollout_over(FileStore(tmp_path), 1.0, refresh_period_s=0.01)
    await new.start()
    await set_share(rollout_over(FileStore(tmp_path), 1.0), 0.25, "ann")
    async with asyncio.timeout(5):
        while new.record.share != 0.25:
            await asyncio.sleep(0.01)
    await new.stop()


async def test_a_folder_that_another_process_keeps_locked_is_not_waited_for_without_end(tmp_path: Path) -> None:
    rollout = rollout_over(FileStore(tmp_path), 0.1)
    with locked(tmp_path):
        async with asyncio.timeout(10):
            with pytest.raises(TimeoutError, match="locked"):
                await set_share(rollout, 0.25, "ann")
    assert rollout.record.share == 0.1


async def test_a_share_that_shrinks_is_in_force_though_the_disk_refused_it_and_the_caller_is_told(
    tmp_path: Path,
) -> None:
    rollout = rollout_over(FileStore(tmp_path / "state"), 0.5)
    (tmp_path / "state").rmdir()
    with pytest.raises(NotStored):
        await set_share(rollout, 0.0, "ann")
    assert rollout.record.share == 0.0


async def test_a_change_is_told_of_though_the_disk_refused_it(tmp_path: Path) -> None:
    told: list[Change] = []
    rollout = Rollout(FileStore(tmp_path / "state"), initial=record_of(0.5), announce=told.append)
    await set_share(rollout, 0.6, "ann")
    (tmp_path / "state" / "rollout.json").unlink()
    (tmp_path / "state" / ".lock").unlink(missing_ok=True)
    (tmp_path / "state").rmdir()
    with pytest.raises(OSError, match="No such file"):
        await set_share(rollout, 0.9, "ann")
    with pytest.raises(NotStored):
        await set_share(rollout, 0.0, "ben")
    assert [(change.who, change.action, change.after["share"]) for change in told] == [
        ("ann", "share", 0.6),
        ("ben", "share", 0.0),
    ]


async def test_a_disk_that_hangs_keeps_nobody_on_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(MemoryStore):
        async def write(self, name: str, document: dict[str, Any], version: int) -> None:
            await disk.wait()
            await super().write(name, document, version)

    monkeypatch.setattr("app.rollout.rollout._RETREAT_S", 0.0)
    disk, store = asyncio.Event(), Hanging()
    rollout = rollout_over(store, 0.5)
    async with asyncio.timeout(5):
        for share in (0.2, 0.0):
            with pytest.raises(NotStored, match="not answered"):
                await set_share(rollout, share)
            assert rollout.record.share == share
        disk.set()
        while (stored := await store.read("rollout")) is None or stored.version < 2:
            await asyncio.sleep(0)
    assert stored.document["share"] == 0.0


async def test_the_log_says_what_accounts_had_and_have_and_what_a_plan_is(tmp_path: Path) -> None:
    rollout = Rollout(MemoryStore(), initial=record_of(0.0), audit=AuditLog(tmp_path / "audit.jsonl"))
    by = By("ann", 7.0)
    for share in (0.5, 1.0):
        await rollout.change(lambda record, share=share: moves.set_override(record, "sub:eve", share, by), "override")
    await rollout.change(lambda record: moves.start(record, Plan(), "run", by), "start")
    first, second, started = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (first["from"]["accounts"], first["to"]["accounts"]) == ({"sub:eve": None}, {"sub:eve": 0.5})
    assert (second["from"]["accounts"], second["to"]["accounts"]) == ({"sub:eve": 0.5}, {"sub:eve": 1.0})
    assert Plan.model_validate(started["evidence"]["plan"]) == Plan()
    assert "accounts" not in started["to"]


async def test_a_change_of_which_the_store_said_nothing_is_no_abandoned_one(tmp_path: Path) -> None:
    class Doubtful(MemoryStore):
        async def write(self, name: str, document: dict[str, Any], version: int) -> None:
            await super().write(name, document, version)
            raise StateDoubtful

    rollout = Rollout(Doubtful(), initial=record_of(0.0), audit=AuditLog(tmp_path / "audit.jsonl"))
    with pytest.raises(StateDoubtful):
        await set_share(rollout, 0.5)
    await rollout.load()
    assert rollout.record.share == 0.5
    actions = [json.loads(line)["action"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert actions == ["share", "doubtful"]


async def test_whoever_changes_it_each_record_that_comes_into_force_is_told_of_once() -> None:
    store, shares = MemoryStore(), list[float]()
    here = Rollout(store, initial=record_of(1.0), on_record=lambda record: shares.append(record.share))
    await set_share(here, 0.1)
    await here.load()
    there = rollout_over(store)
    await there.load()
    await set_share(there, 0.3)
    await here.load()
    await here.load()
    assert shares == [0.1, 0.3]


async def test_a_file_of_the_days_of_a_single_share_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").write_text(
        '{"ray_serve_fraction": 0.25, "changed_at": 7.0, "changed_by": "ann", "version": 3}'
    )
    rollout = rollout_over(FileStore(tmp_path, check_document))
    await rollout.load()
    assert (rollout.record.share, rollout.record.changed_by) == (0.25, "ann")
