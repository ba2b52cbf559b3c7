import json
from pathlib import Path

import pytest

from app.rollout.state import FileStore, MemoryStore, Rollout, StateStore, StateUnreadable


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "state")


async def test_a_document_is_read_as_it_was_written(store: StateStore) -> None:
    assert await store.read("rollout") is None
    await store.write("rollout", {"ray_serve_fraction": 0.25})
    await store.write("rollout", {"ray_serve_fraction": 0.5})
    assert await store.read("rollout") == {"ray_serve_fraction": 0.5}


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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ray_serve_fraction": 2}', '{"share": 1}'])
async def test_a_damaged_file_is_named_and_never_guessed_at(tmp_path: Path, content: str) -> None:
    (tmp_path / "rollout.json").write_text(content)
    with pytest.raises(StateUnreadable):
        await Rollout(FileStore(tmp_path), initial_fraction=1.0).load()


async def test_documents_cannot_be_named_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("../outside", "a/b", "", "A", ".hidden"):
        with pytest.raises(ValueError, match="document name"):
            await FileStore(tmp_path).write(name, {})


async def test_no_temporary_file_stays_behind(tmp_path: Path) -> None:
    await FileStore(tmp_path).write("rollout", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["rollout.json"]
    assert json.loads((tmp_path / "rollout.json").read_text()) == {"a": 1}


async def test_a_write_that_failed_leaves_no_temporary_file_either(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").mkdir()  # what cannot be replaced by a file
    with pytest.raises(OSError, match="directory"):
        await FileStore(tmp_path).write("rollout", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["rollout.json"]
