"""`sluice rollout verify` as an operator runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.rollout.audit import AuditLog, Change, Head
from tests.app.cli.command import EX_CONFIG, assert_one_plain_line, sluice


@pytest.fixture
async def log(tmp_path: Path) -> tuple[Path, Head]:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, wall_clock=lambda: 1.5)
    for n in range(5):
        await audit.append(Change("ann", "share", n / 10, (n + 1) / 10, "because"))
    return path, audit.head


def changed(path: Path, old: bytes, new: bytes) -> None:
    text = path.read_bytes()
    assert len(old) == len(new)
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new))


def test_a_whole_log_tells_its_head(log: tuple[Path, Head], tmp_path: Path) -> None:
    path, head = log
    for seen in ((), ("--head", head.hash), ("--head", str(head.number))):
        result = sluice("rollout", "verify", str(path), *seen, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(rf"5 records, head {head.hash} \({head.number}\)\n", result.stdout)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [(b'"from":0.0,', b'"from":0.9,', 1), (b'"n":3,', b'"n":7,', 3), (b'"from":0.4,', b'"from":0.5,', 5)],
)
def test_one_changed_byte_is_found_and_its_line_named(
    log: tuple[Path, Head], tmp_path: Path, old: bytes, new: bytes, line: int
) -> None:
    path, _ = log
    changed(path, old, new)
    assert_one_plain_line(sluice("rollout", "verify", str(path), cwd=tmp_path), 1, "is not what was written", f"{line}")


def test_a_cut_end_is_found_by_whoever_has_seen_the_head(log: tuple[Path, Head], tmp_path: Path) -> None:
    path, head = log
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert sluice("rollout", "verify", str(path), cwd=tmp_path).returncode == 0
    result = sluice("rollout", "verify", str(path), "--head", str(head.number), cwd=tmp_path)
    assert_one_plain_line(result, 1, "the file ends here", "4 records")


def test_a_log_that_is_not_there_is_a_fault_of_the_settings_or_a_loss(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none.jsonl")
    assert_one_plain_line(sluice("rollout", "verify", nowhere, cwd=tmp_path), EX_CONFIG, "there is no")
    assert_one_plain_line(sluice("rollout", "verify", nowhere, "--head", "1", cwd=tmp_path), 1, "there is no")
