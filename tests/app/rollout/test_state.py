import json
from pathlib import Path

import pytest

from app.rollout.state import (
    FileStore,
    MemoryStore,
    StateConflict,
    StateStore,
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
