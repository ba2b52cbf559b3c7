"""API keys: their form, what is stored of them, and the table on disk with several writers and readers."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.auth import ApiKeyFile, ApiKeyReloader, ApiKeyVerifier, Principal, api_keys, make_key
from app.auth.api_key_file import POLL_S
from app.auth.api_keys import ApiKey, ApiKeys, ApiKeysRefused, read_table, write_table
from app.errors import Unauthenticated
from tests.app.auth.signing import NOW, Clock

PEPPER = b"k" * 48
DESK = Principal("desk-7", "fund", frozenset({"predict", "ops"}), frozenset({"cnn_lstm"}))


def made(principal: Principal = DESK, lifetime_s: int | None = None) -> tuple[str, ApiKey]:
    return make_key(principal, PEPPER, now=NOW, lifetime_s=lifetime_s)


def knowing(clock: Clock, *keys: ApiKey) -> ApiKeyVerifier:
    verifier = ApiKeyVerifier(clock)
    verifier.replace(ApiKeys({key.id: key for key in keys}, PEPPER))
    return verifier


def refused(verifier: ApiKeyVerifier, credential: str) -> bool:
    try:
        verifier.verify(credential)
    except Unauthenticated:
        return True
    return False


def test_a_key_gives_its_principal_and_no_other_key_does() -> None:
    credential, key = made()
    other, other_key = made(Principal("other"))
    verifier = knowing(Clock(), key, other_key)
    assert verifier.verify(credential) == DESK
    assert verifier.verify(other) == Principal("other")
    assert refused(verifier, credential[:12] + other[12:])
    assert refused(knowing(Clock(), other_key), credential)


def test_a_key_has_256_random_bits_behind_an_id() -> None:
    credentials = {made()[0] for _ in range(200)}
    assert len({credential[3:11] for credential in credentials}) == 200
    assert all(len(credential) == 3 + 8 + 1 + 43 and credential.startswith("gk_") for credential in credentials)


def test_nothing_stored_and_nothing_shown_holds_the_key() -> None:
    credential, key = made()
    table = write_table([key], PEPPER).decode()
    for text in (table, repr(key), repr(ApiKeys({key.id: key}, PEPPER))):
        assert credential[12:] not in text
        assert PEPPER.decode() not in text
        assert PEPPER.hex() not in text
    assert key.digest.hex() not in repr(key)


@settings(deadline=None)
@given(st.text(max_size=80) | st.from_regex(r"gk_[a-z2-7]{8}_[A-Za-z0-9_-]{43}"))
def test_no_text_is_taken_for_a_key_or_fails_otherwise(text: str) -> None:
    assert refused(knowing(Clock(), made()[1]), text)


def test_a_changed_key_is_refused() -> None:
    credential, key = made()
    verifier = knowing(Clock(), key)
    for at in range(len(credential)):
        assert refused(verifier, credential[:at] + ("A" if credential[at] != "A" else "B") + credential[at + 1 :])
    for spelling in (credential + "=", credential + "\n", " " + credential, credential[:-1], credential.upper()):
        assert refused(verifier, spelling)


def test_known_and_unknown_ids_both_go_through_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    credential, key = made()
    compared: list[tuple[int, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    verifier = knowing(Clock(), key)
    assert not refused(verifier, credential)
    assert refused(verifier, credential[:12] + "A" * 43)
    assert refused(verifier, "gk_aaaaaaaa_" + credential[12:])
    assert compared == [(32, 32)] * 3


def test_a_key_ends_when_it_was_said_to() -> None:
    clock = Clock()
    credential, key = made(lifetime_s=60)
    verifier = knowing(clock, key)
    clock.now = NOW + 59.9
    assert not refused(verifier, credential)
    clock.now = NOW + 60
    assert refused(verifier, credential)


@pytest.mark.parametrize(
    "principal",
    [
        Principal(""),
        Principal("a\nb"),
        Principal("x" * 300),
        Principal("a", ""),
        Principal("a", scopes=frozenset({"X"})),
    ],
)
def test_a_key_that_no_token_could_say_is_not_made(principal: Principal) -> None:
    with pytest.raises(ValueError, match="must"):
        made(principal)


def table_with(**changes: Any) -> bytes:
    document = json.loads(write_table([made()[1]], PEPPER))
    document["keys"][0] |= changes
    return json.dumps(document).encode()


def test_a_table_comes_back_as_it_was_written() -> None:
    keys = [made(DESK, 60)[1], made(Principal("b"))[1], made(Principal("c", models=frozenset()))[1]]
    assert list(read_table(write_table(keys, PEPPER), PEPPER).keys.values()) == keys


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        write_table([], PEPPER)[:-1],
        write_table([], PEPPER).replace(b'"format": 1', b'"format": 2'),
        b'{"format": 1, "keys": []}',
        table_with(id="../../etc"),
        table_with(id=1),
        table_with(digest="00"),
        table_with(digest="zz" * 32),
        table_with(scopes=["predict"]),
        table_with(subject=""),
        table_with(models="cnn_lstm"),
        table_with(expires_at="never"),
        table_with(expires_at=True),
        table_with(created_at=None),
        b"\xff" * 100,
        b"[" * 100_000,
    ],
    ids=range(18),
)
def test_a_damaged_table_is_refused(text: bytes) -> None:
    with pytest.raises(ApiKeysRefused, match="damaged"):
        read_table(text, PEPPER)


def test_a_table_is_refused_with_another_pepper_or_with_one_id_twice() -> None:
    key = made()[1]
    with pytest.raises(ApiKeysRefused, match="another pepper"):
        read_table(write_table([key], PEPPER), b"x" * 48)
    with pytest.raises(ApiKeysRefused, match="twice"):
        read_table(write_table([key, key], PEPPER), PEPPER)


@pytest.fixture
def file(tmp_path: Path) -> ApiKeyFile:
    return ApiKeyFile(tmp_path / "state" / "api_keys.json", tmp_path / "state" / "api_keys.pepper")


def add(file: ApiKeyFile, subject: str = "desk") -> str:
    return file.add(lambda pepper: make_key(Principal(subject), pepper, now=NOW, lifetime_s=None))


def test_files_are_made_closed_to_others(file: ApiKeyFile, tmp_path: Path) -> None:
    add(file)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert set(modes.values()) == {0o600}
    assert set(modes) == {"api_keys.json", "api_keys.pepper", ".api_keys.json.lock"}


def test_removing_a_key_leaves_the_others(file: ApiKeyFile) -> None:
    first, second = add(file, "first"), add(file, "second")
    assert file.remove(first[3:11])
    assert not file.remove(first[3:11])
    assert set(file.read().keys) == {second[3:11]}


def test_no_more_keys_than_the_table_may_hold(file: ApiKeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add(file)
    monkeypatch.setattr("app.auth.api_key_file.MAX_KEYS", 2)
    add(file)
    with pytest.raises(ApiKeysRefused, match="already"):
        add(file)


@pytest.mark.parametrize("open_file", ["api_keys.json", "api_keys.pepper"])
def test_a_file_that_others_may_open_is_refused(file: ApiKeyFile, tmp_path: Path, open_file: str) -> None:
    add(file)
    (tmp_path / "state" / open_file).chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        file.read()


def test_a_short_pepper_is_refused(file: ApiKeyFile, tmp_path: Path) -> None:
    add(file)
    (tmp_path / "state" / "api_keys.pepper").write_text("short")
    with pytest.raises(ApiKeysRefused, match="32 bytes"):
        file.read()


def test_a_pipe_in_place_of_the_table_is_refused_and_not_waited_for(file: ApiKeyFile, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / "state" / "api_keys.json", 0o600)
    with pytest.raises(ValueError, match="plain file"):
        file.read()


def test_many_writers_lose_no_key(file: ApiKeyFile, tmp_path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from app.auth import ApiKeyFile, Principal, make_key\n"
        "file = ApiKeyFile(Path(sys.argv[1]) / 'api_keys.json', Path(sys.argv[1]) / 'api_keys.pepper')\n"
        "for n in range(25): file.add(lambda pepper: make_key(Principal('x'), pepper, now=1, lifetime_s=None))\n"
    )
    command = [sys.executable, "-c", writer, str(tmp_path / "state")]
    root = Path(__file__).parents[3]
    for process in [subprocess.Popen(command, cwd=root) for _ in range(3)]:
        assert process.wait(60) == 0
    assert len(file.read().keys) == 75


class Followed:
    """A verifier that follows the table, and what the metrics would be told."""

    def __init__(self, file: ApiKeyFile) -> None:
        self.verifier = ApiKeyVerifier(Clock())
        self.outcomes: list[tuple[str, str, int]] = []
        self.reloader = ApiKeyReloader(file, self.verifier.replace, lambda *outcome: self.outcomes.append(outcome))
        self.reloader.load()

    async def judge(self, credential: str, counts: bool) -> None:
        """Wait until the credential counts, or no longer does; a second is promised."""
        async with asyncio.timeout(1.0):
            while refused(self.verifier, credential) is counts:
                await asyncio.sleep(0.01)


async def test_keys_come_and_go_under_a_running_gateway(file: ApiKeyFile) -> None:
    followed = Followed(file)
    await followed.reloader.start()
    first = add(file, "first")
    await followed.judge(first, True)
    second = add(file, "second")
    await followed.judge(second, True)
    file.remove(first[3:11])
    await followed.judge(first, False)
    assert not refused(followed.verifier, second)
    assert followed.reloader.document() == {"keys": 1, "generation": 3, "failing": False}
    await followed.reloader.stop()


async def test_a_damaged_or_missing_table_leaves_the_old_one_in_force(file: ApiKeyFile) -> None:
    credential = add(file)
    followed = Followed(file)
    await followed.reloader.start()
    good = file.path.read_bytes()
    for damage in (lambda: file.path.write_bytes(b"{"), file.path.unlink, lambda: file.path.chmod(0o644)):
        damage()
        await until(lambda: followed.reloader.document()["failing"])
        assert not refused(followed.verifier, credential)
        file.path.write_bytes(good)
        file.path.chmod(0o600)
        await until(lambda: not followed.reloader.document()["failing"])
    assert ("api_keys", "refused", 1) in followed.outcomes
    await followed.reloader.stop()


async def test_a_pepper_that_is_mended_later_is_seen_without_another_change(file: ApiKeyFile, tmp_path: Path) -> None:
    followed = Followed(file)
    await followed.reloader.start()
    (tmp_path / "elsewhere").mkdir()
    other = ApiKeyFile(tmp_path / "elsewhere" / "api_keys.json", tmp_path / "elsewhere" / "api_keys.pepper")
    credential = add(other)
    file.path.parent.mkdir(exist_ok=True)
    other.path.rename(file.path)
    await until(lambda: followed.reloader.document()["failing"])
    (tmp_path / "elsewhere" / "api_keys.pepper").rename(file.path.with_name("api_keys.pepper"))
    await followed.judge(credential, True)
    await followed.reloader.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10 * POLL_S):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_table_has_room_for_as_many_keys_as_it_may_hold() -> None:
    widest = Principal("é" * 255, "é" * 255, frozenset({"predict"}))
    row_bytes = len(write_table([made(widest)[1]], PEPPER))
    assert len(write_table([made()[1]], PEPPER)) * api_keys.MAX_KEYS < api_keys.MAX_TABLE_BYTES
    assert row_bytes < 4096
