from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from app.cli.rollout_report import render
from app.rollout import experiment_picture
from app.rollout.experiment_report import report
from tests.app.cli.command import EX_CONFIG, assert_one_plain_line, sluice
from tests.app.cli.test_rollout import Sluice, gateway
from tests.app.cli.test_rollout import sluice as command
from tests.app.rollout.test_experiment_report import cell

__all__ = ["command", "gateway"]  # fixtures


def text_of(document: dict[str, object]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render(document))
    return capture.get()


def test_every_arm_has_a_column_and_every_figure_its_interval() -> None:
    of = cell("canary")
    document = report([of, cell()], 0.0, draws=50).document()
    text = text_of(document)
    rate = document["arms"][0]["measures"]["hit_rate"]
    assert "canary: canary@1" in text
    assert "stable: stable@1" in text
    assert f"{100 * rate['value']:.1f} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})" in text
    assert "callers as draws" in text
    assert all(note in text for note in document["notes"])


def test_what_cannot_be_told_is_a_dash_and_what_has_no_interval_says_so() -> None:
    text = text_of(report([cell(callers=1)], 0.0, draws=50).document())
    assert "no interval" in text
    assert "less stable's" not in text


def test_an_empty_log_is_a_sentence() -> None:
    assert "Nothing is logged" in text_of(report([], 0.0).document())


def test_a_place_for_no_picture_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    for name, word in (("report.pdf", ".svg"), ("missing/report.png", "folder")):
        result = sluice("rollout", "report", "--picture", name, "--url", "http://127.0.0.1:9", cwd=tmp_path)
        assert_one_plain_line(result, EX_CONFIG, word)


async def test_a_picture_that_cannot_be_written_is_one_plain_line_after_the_report(
    command: Sluice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_picture, "report_picture", lambda document, form: b"")
    (tmp_path / "report.png").mkdir()
    result = await command("rollout", "report", "--picture", "report.png")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("sluice: the picture cannot be written: report.png: ")
    assert "Nothing is logged" in result.stdout
