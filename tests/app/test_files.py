from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from app.files import locked, replace_file


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_who_finds_it_locked_waits_no_longer_than_said(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "lock"
    make = kind == "file"
    with (
        locked(path, make=make),
        pytest.raises(TimeoutError, match="locked") as caught,
        locked(path, timeout_s=0.05),
    ):
        raise AssertionError("two are inside")
    assert caught.value.filename == str(path)
    with locked(path, timeout_s=0.05):
        pass


def test_the_content_and_its_name_are_on_the_disk_when_the_change_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def note(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        synced.append(("folder" if stat.S_ISDIR(mode) else "file", (tmp_path / "a").is_file()))

    monkeypatch.setattr(os, "fsync", note)
    replace_file(tmp_path / "a", b"x")
    assert synced == [("file", False), ("folder", True)]
    assert (tmp_path / "a").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
