"""The copy beside the shared store; what a real Redis does is among the integration tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.rollout.rollout import Rollout
from app.rollout.shared_state import CopiedStore
from app.rollout.state import FileStore, MemoryStore, StateAway, StateConflict, Stored
from tests.app.rollout.rollouts import rollout_over, set_share


class Shared(MemoryStore):
    """A store that can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False

    async def read(self, name: str) -> Stored | None:
        self._check()
        return await super().read(name)

    async def write(self, name: str, document: dict[str, Any], version: int) -> None:
        self._check()
        await super().write(name, document, version)

    def _check(self) -> None:
        if self.is_away:
            raise StateAway


def rollout_of(shared: Shared, folder: Path) -> Rollout:
    return rollout_over(CopiedStore(shared, FileStore(folder)), 1.0)


async def test_a_change_reaches_the_other_gateway_with_its_next_look(tmp_path: Path) -> None:
    shared = Shared()
    here, there = rollout_of(shared, tmp_path / "here"), rollout_of(shared, tmp_path / "there")
    await set_share(here, 0.25, "ann")
    await there.load()
    assert there.record == here.record


async def test_away_the_share_stays_as_it_is_also_over_a_restart_and_cannot_be_changed(tmp_path: Path) -> None:
    shared = Shared()
    here, there = rollout_of(shared, tmp_path / "here"), rollout_of(shared, tmp_path / "there")
    await set_share(here, 0.25, "ann")
    await there.load()
    shared.is_away = True
    await there.load()
    assert there.record.share == 0.25
    with pytest.raises(StateAway):
        await set_share(there, 0.5, "ben")
    restarted = rollout_of(shared, tmp_path / "there")
    await restarted.load()
    assert restarted.record.share == 0.25


async def test_a_shared_store_that_forgot_everything_learns_it_again(tmp_path: Path) -> None:
    shared, empty = Shared(), Shared()
    here = CopiedStore(shared, FileStore(tmp_path))
    await here.write("rollout", {"a": 1}, 7)
    again = CopiedStore(empty, FileStore(tmp_path))
    assert await again.read("rollout") == ({"a": 1}, 7)
    assert await empty.read("rollout") == ({"a": 1}, 7)
    with pytest.raises(StateConflict):
        await again.write("rollout", {"a": 2}, 7)


async def test_an_older_shared_state_gives_way_and_a_newer_one_is_taken(tmp_path: Path) -> None:
    shared = Shared()
    copy = FileStore(tmp_path)
    await copy.write("rollout", {"a": 2}, 2)
    await shared.write("rollout", {"a": 1}, 1)
    store = CopiedStore(shared, copy)
    assert await store.read("rollout") == ({"a": 2}, 2)
    assert await shared.read("rollout") == ({"a": 2}, 2)
    await shared.write("rollout", {"a": 3}, 3)
    assert await store.read("rollout") == ({"a": 3}, 3)
    assert await copy.read("rollout") == ({"a": 3}, 3)


async def test_a_disk_that_keeps_no_copy_does_not_stop_a_change(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    rollout = rollout_of(Shared(), folder)
    folder.rmdir()
    await set_share(rollout, 0.25, "ann")
    assert rollout.record.share == 0.25


async def test_gateways_that_hold_different_documents_of_one_version_all_take_the_shared_one(tmp_path: Path) -> None:
    shared = Shared()
    here, there = rollout_of(shared, tmp_path / "here"), rollout_of(shared, tmp_path / "there")
    await set_share(here, 0.1, "ann")
    shared._stored.clear()
    await set_share(there, 0.9, "ben")  # of the same version
    for rollout in (here, there):
        await rollout.load()
    assert here.record == there.record
    shared.is_away = True
    for folder in ("here", "there"):
        restarted = rollout_of(shared, tmp_path / folder)
        await restarted.load()
        assert restarted.record.share == 0.9


async def test_a_copy_that_nobody_can_read_ends_nothing_and_is_mended(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").write_text("{")
    shared = Shared()
    shared.is_away = True
    rollout = rollout_of(shared, tmp_path)
    await rollout.start()
    assert rollout.record.share == 1.0
    shared.is_away = False
    await set_share(rollout, 0.25, "ann")
    assert await FileStore(tmp_path).read("rollout") == (rollout.record.document(), 1)
    await rollout.stop()
