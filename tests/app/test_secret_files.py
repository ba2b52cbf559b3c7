from __future__ import annotations

import multiprocessing
import os
import secrets
from pathlib import Path

import pytest

from app.secret_files import SecretFile, check_secret, read_secret_file, write_once


def owned(file: Path, content: str) -> Path:
    """A new file in the place of `file`, as a rotation puts it there, for its owner alone."""
    fresh = file.with_suffix(".new")
    fresh.write_text(content)
    fresh.chmod(0o600)
    return fresh.rename(file)


def test_a_secret_is_read_again_when_its_file_changes_and_only_then(tmp_path: Path) -> None:
    file = owned(tmp_path / "token", "first\n")
    secret = SecretFile(file)
    assert secret() == b"first"
    assert secret() is secret()
    owned(file, "again\n")
    assert secret() == b"again"


def test_a_secret_that_has_gone_bad_is_no_longer_given(tmp_path: Path) -> None:
    file = owned(tmp_path / "token", "first")
    secret = SecretFile(file)
    secret()
    file.chmod(0o644)
    for _ in range(2):
        with pytest.raises(ValueError, match="chmod 600"):
            secret()
    file.unlink()
    with pytest.raises(ValueError, match="cannot read"):
        secret()
    owned(file, "first")
    assert secret() == b"first"


def test_random_secrets_of_the_advised_kind_are_taken() -> None:
    for _ in range(200):
        check_secret(secrets.token_urlsafe(48).encode(), "it")
        check_secret(secrets.token_bytes(48), "it")
        check_secret(secrets.token_hex(48).encode(), "it")


N_RACES = 20


def _race(
    folder: Path, together: multiprocessing.synchronize.Barrier, seen: multiprocessing.Queue[tuple[int, bytes]]
) -> None:
    for number in range(N_RACES):
        path = folder / f"key-{number}"
        together.wait(20)
        write_once(path, secrets.token_hex(32).encode())
        seen.put((number, read_secret_file(path)))


def test_of_several_who_make_a_secret_at_once_one_prevails_and_nobody_sees_half_of_it(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    together, seen = fork.Barrier(4), fork.Queue()
    makers = [fork.Process(target=_race, args=(tmp_path, together, seen)) for _ in range(4)]
    for maker in makers:
        maker.start()
    keys = {seen.get(timeout=20) for _ in range(N_RACES * len(makers))}
    for maker in makers:
        maker.join()
    assert [number for number, _ in sorted(keys)] == list(range(N_RACES))  # one for each race
    assert {len(key) for _, key in keys} == {64}
    assert len(os.listdir(tmp_path)) == N_RACES  # no drafts are left


def test_a_secret_that_is_there_stays(tmp_path: Path) -> None:
    write_once(tmp_path / "new" / "key", b"first")
    write_once(tmp_path / "new" / "key", b"second")
    assert read_secret_file(tmp_path / "new" / "key") == b"first"
