from __future__ import annotations

import asyncio
import errno
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.files import locked
from app.rollout import audit
from app.rollout.audit import MAX_RECORD_BYTES, AuditLog, AuditRefused, ChainBroken, Change, Head, verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def a_change(n: int = 0, **fields: Any) -> Change:
    given = {"who": "ann", "action": "share", "before": n, "after": n + 1, "why": "because", **fields}
    return Change(**given)


async def write(path: Path, count: int, **fields: Any) -> Head:
    log = AuditLog(path, wall_clock=lambda: 1.5)
    for n in range(count):
        await log.append(a_change(n, **fields))
    return log.head


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_record_says_who_when_what_from_to_why_and_by_what_evidence(path: Path) -> None:
    log = AuditLog(path, wall_clock=lambda: 1.5)
    await log.append(Change("ann", "rollback", 0.5, 0.1, "errors", {"p": 0.01}))
    [record] = records(path)
    assert {name: record[name] for name in ("who", "at", "action", "from", "to", "why", "evidence")} == {
        "who": "ann",
        "at": 1.5,
        "action": "rollback",
        "from": 0.5,
        "to": 0.1,
        "why": "errors",
        "evidence": {"p": 0.01},
    }
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_chain_that_was_left_alone_is_whole(path: Path) -> None:
    head = await write(path, 5)
    assert verify(path) == head
    assert head.records == 5


async def test_every_changed_byte_is_found(path: Path) -> None:
    await write(path, 3)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for other in {whole[place] ^ 1, whole[place] ^ 0x20, ord(b"\n")} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            with pytest.raises(ChainBroken):
                verify(path)


def without(lines: list[bytes], place: int) -> list[bytes]:
    return lines[:place] + lines[place + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: without(lines, 0),
        lambda lines: without(lines, 2),
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:3], lines[4], lines[3]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:2], b"\n", *lines[2:]],
        lambda lines: [*lines, b"\n"],
        lambda lines: [*lines, b"{}\n"],
        lambda lines: [*lines, b"x" * 200_000],
        lambda lines: [*lines, lines[0][:-1]],
    ],
)
async def test_a_line_that_is_missing_swapped_or_put_in_is_found(
    path: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    await write(path, 5)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ChainBroken):
        verify(path)


async def test_the_first_wrong_line_is_named(path: Path) -> None:
    await write(path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"ann", b"eve")
    path.write_bytes(b"".join(lines))
    with pytest.raises(ChainBroken) as broken:
        verify(path)
    assert broken.value.line == 3


async def test_a_chain_whose_end_was_cut_off_lacks_the_head_that_was_told(path: Path) -> None:
    before = await write(path, 2)
    log = AuditLog(path)
    await log.append(a_change())
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert verify(path) == before
    for told in (log.head.hash, str(log.head.number), repr(float(log.head.number))):
        with pytest.raises(ChainBroken, match="without that head"):
            verify(path, told)


async def test_a_head_that_was_told_earlier_is_found_in_a_chain_that_grew(path: Path) -> None:
    before = await write(path, 2)
    log = AuditLog(path)
    await log.append(a_change())
    for told in (before.hash, f"{float(before.number)!r}", str(log.head.number)):
        assert verify(path, told) == log.head
    for never in ("f" * 64, "12345", "nan", "no number", ""):
        with pytest.raises(ChainBroken):
            verify(path, never)


def test_the_head_as_a_number_is_exact_as_a_float() -> None:
    for text in ("f" * 64, "0" * 63 + "1", "123456789abcd" * 5):
        head = Head(1, text[:64].ljust(64, "0"))
        assert int(float(head.number)) == head.number
        assert head.number < 1 << 52


@pytest.mark.parametrize("left", [1, 40, -2, -1])
async def test_a_torn_last_line_is_found_and_the_next_change_is_whole_beside_it(path: Path, left: int) -> None:
    await write(path, 2)
    whole = path.read_bytes()
    await write(path, 1)
    third = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + third[:left])
    with pytest.raises(ChainBroken, match="torn") as broken:
        verify(path)
    assert broken.value.line == 3
    await write(path, 1, who="ben")
    head = verify(path)
    assert path.read_bytes().startswith(whole + third[:left])
    assert json.loads(path.read_bytes().splitlines()[-1])["who"] == "ben"
    assert head.records == 4  # the rest's own record, or the line that lacked nothing but its end


async def test_what_is_left_of_a_torn_line_cannot_be_changed_either(path: Path) -> None:
    await write(path, 2)
    size_bytes = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"action":"sh')
    await write(path, 1)
    whole = path.read_bytes()
    assert verify(path).records == 4
    for place in range(size_bytes, size_bytes + 14):
        path.write_bytes(whole[:place] + b"?" + whole[place + 1 :])
        with pytest.raises(ChainBroken):
            verify(path)
    path.write_bytes(whole[:size_bytes] + whole[size_bytes + 14 :])
    with pytest.raises(ChainBroken):
        verify(path)


async def test_a_crash_while_a_torn_line_is_being_ended_is_survived_too(path: Path) -> None:
    await write(path, 1)
    with path.open("ab") as file:
        file.write(b"first rest")
    torn = path.read_bytes()
    await write(path, 1)
    mended = path.read_bytes()
    for end in range(len(torn) + 2, len(mended)):  # the line end alone could be anybody's
        path.write_bytes(mended[:end])
        await write(path, 1, who="ben")
        verify(path)
        assert json.loads(path.read_bytes().splitlines()[-1])["who"] == "ben"


async def test_several_workers_append_to_one_chain(path: Path) -> None:
    def work(who: str) -> None:
        asyncio.run(write(path, 20, who=who))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, ("ann", "ben", "cyd", "dan")))
    assert verify(path).records == 80
    for who in ("ann", "ben", "cyd", "dan"):
        assert [record["from"] for record in records(path) if record["who"] == who] == list(range(20))


async def test_changes_are_recorded_in_the_order_in_which_they_were_asked_for(path: Path) -> None:
    log = AuditLog(path)
    await asyncio.gather(*(log.append(a_change(n)) for n in range(20)))
    assert [record["from"] for record in records(path)] == list(range(20))


async def test_what_several_workers_tell_is_recorded_once(path: Path) -> None:
    for _ in range(3):
        await AuditLog(path).append(a_change(action="seen", once="share:7"))
    await AuditLog(path).append(a_change(action="seen", once="share:8"))
    assert [record["once"] for record in records(path)] == ["share:7", "share:8"]


async def test_who_made_a_change_records_it_though_another_worker_was_quicker_to_see_it(path: Path) -> None:
    await AuditLog(path).append(a_change(action="seen", once="share:7"))
    await AuditLog(path).append(a_change(action="rollback", once="share:7", evidence={"p": 0.01}))
    await AuditLog(path).append(a_change(action="seen", once="share:7"))
    assert [(record["action"], record["evidence"]) for record in records(path)] == [
        ("seen", {}),
        ("rollback", {"p": 0.01}),
    ]


async def test_a_change_that_nobody_waits_for_any_more_is_recorded_whole(path: Path) -> None:
    log = AuditLog(path)
    task = asyncio.create_task(log.append(a_change()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await log.append(a_change())
    assert verify(path) == log.head


@pytest.mark.parametrize(
    "fields",
    [
        {"evidence": {"long": "x" * 100_000}},
        {"before": "x" * 100_000},
        {"evidence": {"rate": math.nan, "bound": math.inf}},
        {"evidence": {"what": object()}},
        {"evidence": {"bad": "\ud800"}},
        {"why": "x" * 100_000},
        {"why": "\ud800 \x00 \n \u2028"},
        {"who": "\n"},
        {"evidence": {1: 2}},
        {"once": "\ud800" * 10_000},
    ],
)
async def test_whatever_a_change_holds_is_one_bounded_line(path: Path, fields: dict[str, Any]) -> None:
    await write(path, 2, **fields)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == verify(path).records
    assert max(map(len, lines)) <= MAX_RECORD_BYTES


class FullDisk:
    """Has no room for what is to be kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = True
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(audit.os, "fsync", fsync)


async def test_a_change_that_the_disk_refuses_is_refused_and_leaves_the_chain_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = await write(path, 2)
    disk = FullDisk(monkeypatch)
    log = AuditLog(path)
    with pytest.raises(AuditRefused, match="No space left"):
        await log.append(a_change(9))
    assert verify(path) == head
    disk.is_full = False
    await log.append(a_change(10))
    assert [record["from"] for record in records(path)] == [0, 1, 10]


async def test_what_could_not_be_recorded_is_told_by_a_record_as_soon_as_there_can_be_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missed = []
    log = AuditLog(path, wall_clock=lambda: 7.0, on_missed=lambda: missed.append(1))
    await log.append(a_change())
    disk = FullDisk(monkeypatch)
    await log.note(a_change(action="kill"))
    await log.note(a_change(action="rollback"))
    await log.note(a_change(action="kill"))
    assert len(missed) == 3
    assert "not recorded: kill by ann" in caplog.text
    disk.is_full = False
    await log.note(a_change(action="lift"))
    assert [record["action"] for record in records(path)] == ["share", "gap", "lift"]
    assert records(path)[1]["evidence"] == {"changes": {"kill": 2, "rollback": 1}, "since": 7.0}
    await log.note(a_change())
    assert [record["action"] for record in records(path)] == ["share", "gap", "lift", "share"]
    verify(path)


async def test_what_could_not_be_recorded_is_told_though_no_change_follows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_LOOK_PERIOD_S", 0.0)
    log, disk = AuditLog(path, wall_clock=lambda: 7.0), FullDisk(monkeypatch)
    await log.start()
    await log.note(a_change(action="kill"))
    disk.is_full = False
    async with asyncio.timeout(10):
        while not records(path):
            await asyncio.sleep(0)
    await log.stop()
    [gap] = records(path)
    assert (gap["action"], gap["evidence"]) == ("gap", {"changes": {"kill": 1}, "since": 7.0})
    verify(path)


async def test_what_could_not_be_recorded_is_told_by_a_log_that_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, disk = AuditLog(path), FullDisk(monkeypatch)
    await log.start()
    await log.note(a_change(action="rollback"))
    disk.is_full = False
    await log.stop()
    assert [record["action"] for record in records(path)] == ["gap"]


async def test_a_chain_that_was_changed_is_not_gone_on_with(path: Path) -> None:
    await write(path, 3)
    path.write_bytes(path.read_bytes().replace(b"ann", b"eve", 1))
    before = path.read_bytes()
    broken = []
    log = AuditLog(path, show_broken=broken.append)
    with pytest.raises(AuditRefused, match="not what was written: line 1"):
        await log.append(a_change())
    assert path.read_bytes() == before
    assert broken == [True]
    await log.note(a_change(action="kill"))


@pytest.mark.parametrize("cut", [lambda path: os.truncate(path, 10), lambda path: path.unlink()])
async def test_a_file_that_became_shorter_under_a_running_gateway_is_noticed(
    path: Path, cut: Callable[[Path], None]
) -> None:
    broken = []
    log = AuditLog(path, show_broken=broken.append)
    await log.append(a_change())
    cut(path)
    with pytest.raises(AuditRefused, match="shorter than it was"):
        await log.append(a_change())
    assert broken[-1]


async def test_the_head_is_told_at_the_start_and_after_each_change(path: Path) -> None:
    head = await write(path, 2)
    told: list[Head] = []
    log = AuditLog(path, on_head=told.append)
    await log.start()
    await log.append(a_change())
    await log.stop()
    assert told == [head, verify(path)]


async def test_a_lock_that_another_process_keeps_refuses_the_change(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(path, 1)
    monkeypatch.setattr(audit, "locked", partial(locked, timeout_s=0.05))
    with locked(path), pytest.raises(AuditRefused, match="locked"):
        await AuditLog(path).append(a_change())
    assert verify(path).records == 1
