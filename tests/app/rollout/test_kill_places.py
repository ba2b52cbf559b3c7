from __future__ import annotations

import errno
from pathlib import Path

import pytest

from app.rollout.kill_places import KillFile, KillsUnreadable
from app.rollout.kills import Entry, Kills
from tests.app.rollout.test_kills import entry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kill.json"


def full_disk(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(kills: Kills | None) -> list[str]:
    assert kills is not None
    return [kill.name for kill in kills.killed()]


def test_where_there_is_no_file_nothing_is_killed(path: Path) -> None:
    file = KillFile(path)
    assert names(file.look()) == []
    assert file.look() is None  # seen already


def test_what_one_worker_writes_another_sees_once(path: Path) -> None:
    here, there = KillFile(path), KillFile(path)
    here.merge(Kills([entry("MSFT")]), 2.0)
    assert names(there.look()) == ["MSFT"]
    assert there.look() is None


def test_each_worker_adds_what_the_file_lacks_and_loses_nothing(path: Path) -> None:
    KillFile(path).merge(Kills([entry("MSFT")]), 2.0)
    merged, lacked = KillFile(path).merge(Kills([entry("AAPL"), entry("MSFT")]), 2.0)
    assert sorted(names(merged)) == sorted(names(KillFile(path).look())) == ["AAPL", "MSFT"]
    assert [one.name for one in lacked] == ["AAPL"]


def test_on_a_disk_that_is_full_the_table_takes_the_room_that_was_spared(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KillFile(path)
    file.merge(Kills([entry("MSFT")]), 2.0)
    file.keep_spare()
    monkeypatch.setattr("app.rollout.kill_places.replace_file", full_disk)
    merged, _ = file.merge(Kills([entry("AAPL")]), 2.0)
    assert sorted(names(merged)) == sorted(names(KillFile(path).look())) == ["AAPL", "MSFT"]
    with pytest.raises(OSError, match="No space"):  # the room is there once
        file.merge(Kills([entry("TSLA")]), 2.0)
    monkeypatch.undo()
    file.keep_spare()
    assert sorted(names(KillFile(path).look())) == ["AAPL", "MSFT"]


def test_without_spared_room_a_full_disk_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.rollout.kill_places.replace_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        KillFile(path).merge(Kills([entry()]), 2.0)


@pytest.mark.parametrize("content", [b"", b"{", b'{"entries": [{}]}', b"\0" * 100])
def test_a_file_that_is_no_table_is_told_and_put_aside_by_the_next_change(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    file = KillFile(path)
    with pytest.raises(KillsUnreadable, match="mend it, or delete it"):
        file.look()
    with pytest.raises(KillsUnreadable):
        file.merge(Kills(), 2.0, replace_unreadable=False)
    file.merge(Kills([entry("MSFT")]), 2.0)
    assert names(file.look()) == ["MSFT"]
    assert path.with_name("kill.json.unreadable").read_bytes() == content


def test_a_file_that_others_may_write_to_is_not_believed(path: Path) -> None:
    KillFile(path).merge(Kills([entry()]), 2.0)
    path.chmod(0o666)
    with pytest.raises(KillsUnreadable):
        KillFile(path).look()


def test_a_lift_reaches_the_file(path: Path) -> None:
    file = KillFile(path)
    file.merge(Kills([entry(at=1)]), 2.0)
    lift: Entry = entry(at=2, killed=False)
    file.merge(Kills([lift]), 3.0)
    assert names(KillFile(path).look()) == []
