import asyncio
import json
from pathlib import Path

import pytest

from app.files import locked
from app.rollout.state import (
    FileStore,
    MemoryStore,
    Rollout,
    StateConflict,
    StateStore,
    StateUnreadable,
    share_of,
)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "state")


async def test_a_document_is_read_as_it_was_written(store: StateStore) -> None:
    assert await store.read("rollout") is None
    await store.write("rollout", {"ray_serve_fraction": 0.25}, 1)
    await store.write("rollout", {"ray_serve_fraction": 0.5}, 2)
    assert await store.read("rollout") == ({"ray_serve_fraction": 0.5}, 2)


@pytest.mark.parametrize("version", [1, 2])
async def test_of_two_who_write_the_same_version_one_is_told(store: StateStore, version: int) -> None:
    await store.write("rollout", {"by": "ann"}, 2)
    with pytest.raises(StateConflict):
        await store.write("rollout", {"by": "ben"}, version)
    assert await store.read("rollout") == ({"by": "ann"}, 2)


async def test_a_changed_share_is_in_force_and_survives_a_restart(store: StateStore) -> None:
    rollout = Rollout(store, initial_fraction=1.0, wall_clock=lambda: 7.0)
    await rollout.load()
    await rollout.set_fraction(0.05, "ops-anna")
    assert rollout.fraction() == 0.05

    restarted = Rollout(store, initial_fraction=1.0)
    await restarted.load()
    assert restarted.document() == {"ray_serve_fraction": 0.05, "changed_at": 7.0, "changed_by": "ops-anna"}


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), float("inf")])
async def test_what_is_no_share_changes_nothing(store: StateStore, fraction: float) -> None:
    rollout = Rollout(store, initial_fraction=0.3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        await rollout.set_fraction(fraction, "ops-anna")
    assert rollout.fraction() == 0.3


async def test_a_share_that_the_disk_refused_is_not_in_force(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "state")
    rollout = Rollout(store, initial_fraction=0.3)
    (tmp_path / "state").rmdir()
    with pytest.raises(OSError, match="No such file"):
        await rollout.set_fraction(0.9, "ops-anna")
    assert rollout.fraction() == 0.3


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
        await Rollout(FileStore(tmp_path), initial_fraction=1.0).load()


async def test_documents_cannot_be_named_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("../outside", "a/b", "", "A", ".hidden"):
        with pytest.raises(ValueError, match="document name"):
            await FileStore(tmp_path).write(name, {}, 1)


async def test_no_temporary_file_stays_behind(tmp_path: Path) -> None:
    await FileStore(tmp_path).write("rollout", {"a": 1}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rollout.json"]
    assert json.loads((tmp_path / "rollout.json").read_text()) == {"a": 1, "version": 1}


async def test_a_write_that_failed_leaves_no_temporary_file_either(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").mkdir()  # what cannot be replaced by a file
    with pytest.raises(OSError, match="directory"):
        await FileStore(tmp_path).write("rollout", {"a": 1}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rollout.json"]


async def test_a_file_without_a_version_is_the_first(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").write_text('{"ray_serve_fraction": 0.5}')
    assert await FileStore(tmp_path).read("rollout") == ({"ray_serve_fraction": 0.5}, 1)


async def test_who_sets_the_share_last_wins_and_the_other_sees_it_with_the_next_look(store: StateStore) -> None:
    ann, ben = (Rollout(store, initial_fraction=1.0) for _ in range(2))
    await ann.set_fraction(0.1, "ann")
    await ben.set_fraction(0.2, "ben")  # without having looked
    assert (ann.fraction(), ben.fraction()) == (0.1, 0.2)
    await ann.load()
    assert ann.document() == ben.document()
    await ann.set_fraction(0.3, "ann")
    await ben.load()
    assert ben.fraction() == 0.3


async def test_many_writers_at_once_lose_no_version(store: StateStore) -> None:
    rollouts = [Rollout(store, initial_fraction=1.0) for _ in range(2)]
    await asyncio.gather(*(rollout.set_fraction(0.5, "ann") for rollout in rollouts))
    stored = await store.read("rollout")
    assert stored is not None
    assert stored.version == 2


@pytest.mark.parametrize("content", ["{", '{"ray_serve_fraction": "x", "version": 9}'])
async def test_a_change_replaces_a_damaged_file(tmp_path: Path, content: str) -> None:
    rollout = Rollout(FileStore(tmp_path, share_of), initial_fraction=1.0)
    await rollout.set_fraction(0.5, "ann")
    (tmp_path / "rollout.json").write_text(content)
    await rollout.set_fraction(0.25, "ann")
    restarted = Rollout(FileStore(tmp_path, share_of), initial_fraction=1.0)
    await restarted.load()
    assert restarted.fraction() == 0.25


async def test_of_two_documents_of_one_version_the_stored_one_is_in_force() -> None:
    store = MemoryStore()
    here = Rollout(store, initial_fraction=1.0)
    await here.set_fraction(0.1, "ann")
    forgetful = MemoryStore()
    await Rollout(forgetful, initial_fraction=1.0).set_fraction(0.9, "ben")
    store._stored = forgetful._stored
    await here.load()
    assert here.fraction() == 0.9


async def test_what_another_process_writes_into_the_file_is_followed(tmp_path: Path) -> None:
    new = Rollout(FileStore(tmp_path), initial_fraction=1.0, refresh_period_s=0.01)
    await new.start()
    await Rollout(FileStore(tmp_path), initial_fraction=1.0).set_fraction(0.25, "ann")
    async with asyncio.timeout(5):
        while new.fraction() != 0.25:
            await asyncio.sleep(0.01)
    await new.stop()


async def test_a_folder_that_another_process_keeps_locked_is_not_waited_for_without_end(tmp_path: Path) -> None:
    rollout = Rollout(FileStore(tmp_path), initial_fraction=1.0)
    with locked(tmp_path):
        async with asyncio.timeout(10):
            with pytest.raises(TimeoutError, match="locked"):
                await rollout.set_fraction(0.25, "ann")
    assert rollout.fraction() == 1.0
