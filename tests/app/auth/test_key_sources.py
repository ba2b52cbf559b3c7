"""Where public keys come from: what a file or an issuer may do, and what stays in force when it does worse."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.auth import KeyFile, KeySet, KeyUrl, key_sources, watched_file
from app.auth import file_source as file_source_module
from app.auth.jwks import KeysRefused
from app.auth.key_sources import FetchPace
from app.auth.watched_file import WatchedFile
from tests.app.auth.issuer import certificate, issuing
from tests.app.auth.signing import ec_key, jwks, public_jwk, rsa_key

FIRST = public_jwk(ec_key("first"), "first")
SECOND = public_jwk(rsa_key(), "second")
DAMAGED = [
    b"{",
    b"",
    b"[]",
    jwks(FIRST)[:-5],
    jwks({**FIRST, "d": "AAAA"}),
    jwks({**FIRST, "kid": "../x"}),
    b"\0" * 70_000,
]


class Taken:
    """The sets that a source gave, and the outcomes that the metrics would be told."""

    def __init__(self) -> None:
        self.sets: list[KeySet | None] = []
        self.outcomes: list[tuple[str, str, int]] = []

    def count(self, what: str, outcome: str, in_force: int) -> None:
        self.outcomes.append((what, outcome, in_force))

    def kids(self) -> set[str]:
        keys = self.sets[-1] if self.sets else None
        return set() if keys is None else {kid for kid in ("first", "second") if kid in keys._keys}


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(FIRST))
    path.chmod(0o644)
    return path


def file_source(path: Path, taken: Taken) -> KeyFile:
    source = KeyFile(path, taken.sets.append, taken.count)
    source.load()
    return source


async def until(condition: Callable[[], Any], within_s: float = 1.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def replace(path: Path, text: bytes) -> None:
    """As a careful operator does it: beside, then in its place."""
    beside = path.with_name("new.json")
    beside.write_bytes(text)
    beside.chmod(0o644)
    beside.rename(path)


async def test_a_changed_file_is_in_force_within_a_second(path: Path, taken: Taken) -> None:
    source = file_source(path, taken)
    assert taken.kids() == {"first"}
    await source.start()
    replace(path, jwks(FIRST, SECOND))
    await until(lambda: taken.kids() == {"first", "second"})
    path.write_bytes(jwks(SECOND))  # written over in place
    await until(lambda: taken.kids() == {"second"})
    await source.stop()
    assert source.document() == {"source": "file", "keys": 1, "generation": 3, "failing": False}


async def test_a_change_within_one_tick_of_the_file_system_s_clock_is_seen(
    path: Path, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second text is as long as the first, and written at what the file system takes for the same time."""
    monkeypatch.setattr("app.auth.watched_file._stamp", lambda path: (1, path.stat().st_size))
    source = file_source(path, taken)
    path.write_bytes(jwks(FIRST).replace(b'"first"', b'"fixst"'))
    assert await source.renew() is True
    assert taken.sets[-1] is not None
    assert taken.sets[-1].get("fixst")


def test_a_file_that_rests_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = WatchedFile(path, max_bytes=1 << 16, forbidden_mode=0o022)
    assert [file.look() is None for _ in range(3)] == [False, True, True]
    monkeypatch.setattr(watched_file, "read_closed_file", None)
    assert file.look() is None


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
async def test_a_damaged_file_leaves_the_old_keys_in_force_until_it_is_mended(
    path: Path, taken: Taken, damage: bytes
) -> None:
    source = file_source(path, taken)
    for text in (damage, damage + b" "):
        replace(path, text)
        assert await source.renew() is False
        assert source.document() == {"source": "file", "keys": 1, "generation": 1, "failing": True}
    assert taken.outcomes[-1] == ("tokens", "refused", 1)
    replace(path, jwks(FIRST))  # what is in force already, so that only the fault is gone
    await source.renew()
    assert source.document()["failing"] is False
    replace(path, jwks(SECOND))
    await source.renew()
    assert taken.kids() == {"second"}


async def test_a_missing_or_opened_file_leaves_the_old_keys_in_force(path: Path, taken: Taken) -> None:
    source = file_source(path, taken)
    path.chmod(0o664)
    assert await source.renew() is False
    assert source.document()["failing"]
    path.unlink()
    assert await source.renew() is False
    os.mkfifo(path)
    assert await source.renew() is False
    path.unlink()
    path.mkdir()
    assert await source.renew() is False
    assert taken.kids() == {"first"}


def test_a_bad_file_is_refused_at_the_start(path: Path, taken: Taken) -> None:
    path.write_bytes(jwks(FIRST)[:-3])
    with pytest.raises(KeysRefused):
        file_source(path, taken)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file_source(path, taken)


async def test_a_log_line_says_what_is_wrong_once_and_no_part_of_a_key(
    path: Path, taken: Taken, caplog: pytest.LogCaptureFixture
) -> None:
    source = file_source(path, taken)
    for end in (b"", b" ", b"  "):
        replace(path, jwks({**FIRST, "d": "c2VjcmV0LXNjYWxhcg"}) + end)
        await source.renew()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "public keys only" in record.getMessage()
    assert "c2VjcmV0" not in caplog.text
    assert FIRST["x"] not in caplog.text


def url_source(url: str, taken: Taken, **options: Any) -> KeyUrl:
    return KeyUrl(url, taken.sets.append, taken.count, **({"refresh_s": 300.0, "max_age_s": 86400.0} | options))


async def test_an_issuer_s_keys_are_fetched_and_only_a_change_makes_a_generation(taken: Taken) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        assert await source.fetch() == 300.0
        assert await source.fetch() == 300.0
        assert len(taken.sets) == 1
        issuer.body = jwks(FIRST, SECOND)
        await source.fetch()
        assert taken.kids() == {"first", "second"}
        assert source.document() == {"source": "url", "keys": 2, "generation": 2, "failing": False}


@pytest.mark.parametrize(
    ("cache_control", "due_s"),
    [
        ("", 300),
        ("max-age=60", 60),
        ("public, max-age=60, must-revalidate", 60),
        ("MAX-AGE=60", 60),
        ("max-age=0", 5),
        ("max-age=1", 5),
        ("max-age=86400", 300),
        ("no-store", 5),
        ("no-cache, max-age=60", 5),
        ("max-age=-1", 300),
        ("max-age=abc", 300),
        ("s-max-age=7", 300),
        ("max-age=999999999999999999", 300),
    ],
)
async def test_the_issuer_s_cache_control_counts_within_our_bounds(
    taken: Taken, cache_control: str, due_s: float
) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        issuer.headers = [f"Cache-Control: {cache_control}"]
        assert await url_source(issuer.url, taken).fetch() == due_s


class Moved:
    """A monotonic clock, moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_keys_that_the_issuer_has_not_given_for_too_long_are_let_go(
    taken: Taken, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Moved()
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken, max_age_s=600.0, clock=clock)
        await source.fetch()
        clock.now += 599
        assert await source.fetch() == 300.0  # the same set, given anew
        issuer.answer = BAD_ANSWERS["not found"]
        clock.now += 599.5
        assert await source.fetch() == 0.5  # the next look is not after their end
        assert taken.kids() == {"first"}
        clock.now += 0.5
        await source.fetch()
        assert taken.sets[-1] is None
        assert source.document() == {"source": "url", "keys": 0, "generation": 1, "failing": True}
        assert ("tokens", "dropped", 0) in taken.outcomes
        await source.fetch()
        assert [record.getMessage() for record in caplog.records].count(caplog.records[-1].getMessage()) == 1
        assert "the 1 in force count no longer" in caplog.text
        issuer.answer = None
        await source.fetch()  # the very same text as before
        assert taken.kids() == {"first"}
        assert source.document()["failing"] is False


BAD_ANSWERS = {
    "not found": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "server error with keys": b"HTTP/1.1 500 Oh\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(jwks(SECOND))
    + jwks(SECOND),
    "no HTTP": b"SSH-2.0-OpenSSH\r\n",
    "nothing": b"",
    "torn": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nConnection: close\r\n\r\n" + jwks(SECOND),
    "compressed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n\x1f\x8b",
    "giant": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b" " * (1 << 20),
    "a page": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html>",
    "header bomb": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_a_bad_answer_leaves_the_old_keys_in_force_and_is_asked_for_again_soon(taken: Taken, name: str) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.fetch()
        issuer.answer = BAD_ANSWERS[name]
        assert [await source.fetch() for _ in range(3)] == [1.0, 2.0, 4.0]
        assert taken.kids() == {"first"}
        assert source.document()["failing"]
        issuer.answer = None
        assert await source.fetch() == 300.0
        assert not source.document()["failing"]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
async def test_a_damaged_set_leaves_the_old_keys_in_force(taken: Taken, text: bytes) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.fetch()
        issuer.body = text
        assert await source.fetch() == 1.0
        assert taken.kids() == {"first"}


async def test_an_issuer_that_hangs_is_given_up(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sources, "FETCH_TIMEOUT_S", 0.2)
    async with issuing(jwks(FIRST)) as issuer:
        issuer.hangs = True
        assert await url_source(issuer.url, taken).fetch() == 1.0


async def test_waiting_between_failures_ends_at_a_minute(taken: Taken) -> None:
    source = url_source("http://127.0.0.1:9/keys", taken)
    waits = [await source.fetch() for _ in range(9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert [await url_source("http://127.0.0.1:9/keys", taken, refresh_s=1.5).fetch() for _ in range(1)] == [1.0]


async def test_neither_redirects_nor_proxies_nor_cookies_are_followed(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with issuing(jwks(SECOND)) as canary, issuing(jwks(FIRST)) as issuer:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, canary.url.removesuffix("/keys"))
        issuer.headers = ["Set-Cookie: a=b"]
        source = url_source(issuer.url, taken)
        await source.fetch()
        await source.fetch()
        assert taken.kids() == {"first"}
        issuer.answer = f"HTTP/1.1 302 Found\r\nLocation: {canary.url}\r\nContent-Length: 0\r\n\r\n".encode()
        await source.fetch()
        assert canary.hits == []
        assert all("cookie" not in hit.lower() and "authorization" not in hit.lower() for hit in issuer.hits)


async def test_tls_must_be_vouched_for_by_the_certificates_given(taken: Taken, tmp_path: Path) -> None:
    tls, ca_file = certificate(tmp_path)
    async with issuing(jwks(FIRST), tls) as issuer:
        assert await url_source(issuer.url, taken).fetch() == 1.0
        assert taken.sets == []
        trusted = ssl.create_default_context(cafile=ca_file)
        await url_source(issuer.url, taken, tls=trusted).fetch()
        assert taken.kids() == {"first"}


async def test_the_url_is_asked_again_when_that_is_due(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sources, "MIN_REFRESH_S", 0.01)
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken, refresh_s=0.05)
        await source.start()
        await until(lambda: taken.kids() == {"first"})
        issuer.body = jwks(SECOND)
        await until(lambda: taken.kids() == {"second"})
        await source.stop()


async def test_the_start_waits_for_an_issuer_that_answers_and_a_second_for_one_that_hangs(taken: Taken) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.start()
        assert taken.kids() == {"first"}
        await source.stop()
        issuer.hangs = True
        source = url_source(issuer.url, taken)
        started_at = time.monotonic()
        await source.start()
        assert 0.9 < time.monotonic() - started_at < 2.5
        await source.stop()


async def test_a_fault_that_nobody_foresaw_does_not_end_the_looking(
    path: Path, taken: Taken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.auth.reload._PAUSE_S", 0.01)
    source = file_source(path, taken)

    def fail(text: bytes) -> KeySet:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(source, "_read", fail)
    await source.start()
    replace(path, jwks(FIRST, SECOND))
    await until(lambda: "ZeroDivisionError" in caplog.text)
    replace(path, jwks(SECOND))
    await until(lambda: taken.kids() == {"second"}, within_s=3)
    await source.stop()


async def test_who_asks_gives_up_on_a_file_that_hangs_and_what_it_held_is_not_lost(
    path: Path, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_source_module, "RENEWAL_PATIENCE_S", 0.05)
    source = file_source(path, taken)
    really = key_sources.read_jwks
    monkeypatch.setattr(source, "_read", lambda text: (time.sleep(0.2), really(text))[1])
    replace(path, jwks(SECOND))
    assert await source.renew() is False
    await until(lambda: taken.kids() == {"second"})


async def test_an_issuer_that_is_late_is_taken_when_it_comes(taken: Taken) -> None:
    async with issuing(b"") as first:
        port = int(first.url.rsplit(":")[-1].split("/")[0])
    source = url_source(f"http://127.0.0.1:{port}/keys", taken)
    started_at = time.monotonic()
    await source.start()
    assert time.monotonic() - started_at < 0.5
    await until(lambda: source.document()["failing"])
    async with issuing(jwks(FIRST), port=port):
        await until(lambda: taken.kids() == {"first"}, within_s=5)
    await source.stop()


async def test_an_unknown_key_has_the_set_fetched_at_once_and_the_asker_waits_for_it(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sources, "MIN_REFRESH_S", 0.05)
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.start()
        await until(lambda: taken.kids() == {"first"})
        await asyncio.sleep(0.1)
        issuer.body = jwks(FIRST, SECOND)
        assert await source.renew() is True
        assert taken.kids() == {"first", "second"}
        await source.stop()


async def test_strange_tokens_cannot_make_fetches_frequent_nor_be_held_up(taken: Taken) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.start()
        await until(lambda: taken.kids() == {"first"})
        started_at = time.monotonic()
        assert [await source.renew() for _ in range(500)] == [False] * 500
        assert time.monotonic() - started_at < key_sources.RENEWAL_PATIENCE_S
        await asyncio.sleep(0.3)  # in which a fetch would have come, were there no distance between two
        assert len(issuer.hits) == 1 + key_sources.MAX_FETCHES_AT_ONCE
        await source.stop()


async def test_a_key_that_is_added_just_after_a_fetch_is_found_at_once_though_a_stranger_asked_before(
    taken: Taken,
) -> None:
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.start()
        assert await source.renew() is False
        issuer.body = jwks(FIRST, SECOND)
        assert await source.renew() is True
        assert taken.kids() == {"first", "second"}
        await source.stop()


async def test_who_asks_while_an_older_answer_is_on_its_way_waits_for_the_next(taken: Taken) -> None:
    source = url_source("http://127.0.0.1:9/keys", taken)
    answers, asked = [asyncio.Event() for _ in range(3)], 0

    async def answer() -> tuple[bytes, float]:
        nonlocal asked
        asked += 1
        text = jwks(FIRST) if asked < 3 else jwks(FIRST, SECOND)
        await answers[asked - 1].wait()
        return text, 300.0

    source._get = answer  # type: ignore[method-assign]
    answers[0].set()
    await source.start()
    early = asyncio.create_task(source.renew())
    await until(lambda: asked == 2)
    late = asyncio.create_task(source.renew())  # the key is added now, after the issuer has read what it answers
    await asyncio.sleep(0)
    answers[1].set()
    assert await early is False
    answers[2].set()
    assert await late is True
    await source.stop()


def test_early_fetches_come_two_in_a_row_and_then_every_five_seconds() -> None:
    clock = Moved()
    pace = FetchPace(clock)
    spent = []
    for _ in range(600):
        if not pace.wait_s():
            pace.spend()
            spent.append(clock.now - 1000.0)
        clock.now += 0.1
    assert [round(moment) for moment in spent[:4]] == [0, 0, 5, 10]
    assert len(spent) <= 14


def test_a_stranger_who_asks_every_five_seconds_leaves_one_fetch_for_others() -> None:
    clock = Moved()
    pace = FetchPace(clock)
    for _ in range(100):
        pace.spend()
        assert pace.wait_s() == 0.0
        clock.now += 5.0


async def test_of_many_who_ask_while_one_looks_at_the_file_all_share_the_next_look(
    path: Path, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = file_source(path, taken)
    looks, slow = [], threading.Event()
    really = source._look

    def look() -> KeySet | None:
        looks.append(path.read_bytes())
        slow.wait(5)
        return really()

    monkeypatch.setattr(source, "_look", look)
    first = asyncio.create_task(source.renew())
    await until(lambda: len(looks) == 1)
    replace(path, jwks(SECOND))
    others = [asyncio.create_task(source.renew()) for _ in range(50)]
    await asyncio.sleep(0)
    slow.set()
    await asyncio.gather(first, *others)
    assert taken.kids() == {"second"}
    assert len(looks) == 2


async def test_nobody_waits_long_for_an_issuer_that_hangs(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sources, "MIN_REFRESH_S", 0.01)
    monkeypatch.setattr(key_sources, "RENEWAL_PATIENCE_S", 0.05)
    async with issuing(jwks(FIRST)) as issuer:
        source = url_source(issuer.url, taken)
        await source.start()
        await until(lambda: taken.kids() == {"first"})
        await asyncio.sleep(0.05)
        issuer.hangs = True
        assert await asyncio.wait_for(source.renew(), 1.0) is False
        await source.stop()
