"""Where a command takes its token from, and that no other user of the machine need see it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import access, rollout
from app.settings import Settings

TOKEN = "eyJh.eyJz.c2ln"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


def taken(token: str | None) -> str:
    return access.token_for(Settings(_env_file=None), token, "operator", "ops")


def test_a_token_may_stand_in_a_file_come_by_standard_input_or_be_given(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(TOKEN + "\n"))
    assert [taken(token) for token in (f"@{token_file}", "-", TOKEN)] == [TOKEN] * 3


def test_a_file_that_others_may_read_is_refused(token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_file.chmod(0o640)
    with pytest.raises(SystemExit) as ended:
        taken(f"@{token_file}")
    assert ended.value.code == 78
    assert "chmod 600" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "\u2603"])
def test_what_is_no_token_is_refused_and_not_repeated(
    text: str, token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token_file.write_text(text)
    with pytest.raises(SystemExit):
        taken(f"@{token_file}")
    told = capsys.readouterr().err
    assert told == "sluice: the token is none: it must be visible ASCII characters and nothing else\n"


def test_a_token_in_the_environment_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given: list[str | None] = []

    def refuse(settings: Settings, url: str | None, token: str | None, scope: str) -> None:
        given.append(token)
        raise SystemExit(1)

    monkeypatch.setattr(rollout, "gateway_client", refuse)
    for words, environment in ((["show"], TOKEN), (["show", "--token", "other"], TOKEN), (["show"], None)):
        CliRunner().invoke(rollout.commands, words, env={"SLUICE_TOKEN": environment})
    assert given == [TOKEN, "other", None]
