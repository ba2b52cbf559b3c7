from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.rollout.kills import KEEP_LIFTED_S, MAX_KILLS, Entry, Kills, format_kills, parse_kills

words = st.sampled_from(["a", "b"])
entries = st.builds(
    Entry,
    scope=st.just("symbol"),
    name=st.sampled_from(["MSFT", "AAPL", "TSLA"]),
    killed=st.booleans(),
    actor=words,
    reason=words,
    at=st.integers(0, 3).map(float),
)
tables = st.lists(entries, max_size=8).map(Kills)


def entry(name: str = "MSFT", at: float = 1.0, *, killed: bool = True, actor: str = "ann") -> Entry:
    return Entry("symbol", name, killed, actor, "because", at)


@given(tables, tables, tables)
def test_merged_in_whatever_order_and_however_often_tables_come_to_the_same(
    one: Kills, two: Kills, three: Kills
) -> None:
    left = one.merged(two, 5.0).merged(three, 5.0)
    assert left == three.merged(two, 5.0).merged(one, 5.0).merged(three, 5.0)
    assert not left.beyond(left)


@given(tables, tables)
def test_what_a_table_lacks_makes_it_the_merged_one(one: Kills, two: Kills) -> None:
    assert one.merged(two.beyond(one), 5.0) == one.merged(two, 5.0)


def test_of_one_moment_a_kill_counts_and_not_a_lift() -> None:
    kill, lift = entry(actor="ann"), entry(actor="zoe", killed=False)
    assert Kills([kill, lift]).killed() == Kills([lift, kill]).killed() == [kill]


def test_a_later_lift_ends_a_kill_and_an_older_kill_does_not_come_back() -> None:
    table = Kills([entry(at=1)]).merged([entry(at=2, killed=False)], 3.0)
    assert not table.merged([entry(at=1)], 4.0).killed()


def test_lifts_are_forgotten_after_a_week_and_kills_never() -> None:
    table = Kills([entry("A", killed=False), entry("B")]).merged([], 2.0 + KEEP_LIFTED_S)
    assert [kept.name for kept in table] == ["B"]


def test_where_there_are_too_many_the_oldest_lifts_go() -> None:
    lifts = [entry(f"L{n}", at=float(n), killed=False) for n in range(MAX_KILLS)]  # with one more the table is full
    table = Kills(lifts).merged([entry("K", at=0.5)], float(MAX_KILLS))
    assert len(list(table)) == MAX_KILLS
    assert [kill.name for kill in table.killed()] == ["K"]
    assert table.lifted()[0].name == "L1"


def test_of_a_full_table_everything_can_be_lifted() -> None:
    full = Kills([entry(f"K{n}") for n in range(MAX_KILLS + 1)])
    assert len(full.merged([entry("K7", at=2, killed=False)], 3.0).killed()) == MAX_KILLS


@given(tables)
def test_a_table_is_read_as_it_was_written(table: Kills) -> None:
    assert parse_kills(format_kills(table)) == table


@pytest.mark.parametrize(
    "change",
    [
        {"scope": "planet"},
        {"name": "msft"},
        {"killed": 1},
        {"actor": ""},
        {"reason": "two\nlines"},
        {"reason": "x" * 201},
        {"at": -1},
        {"at": True},
        {"at": 1e300},
        {"more": 1},
    ],
)
def test_a_table_with_one_wrong_entry_is_none(change: dict[str, Any]) -> None:
    document = json.loads(format_kills(Kills([entry()])))
    document["entries"].append({**document["entries"][0], **change})
    with pytest.raises(ValueError, match=r".+"):
        parse_kills(json.dumps(document).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b'{"entries": {}}', b'{"entries": [], "x": 1}', b"\xff", b"[" * 10**5])
def test_what_is_no_table_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_kills(text)
