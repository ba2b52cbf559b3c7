"""The benchmarks' command line: how it ends, and what it says to an operator."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import cli

ROOT = Path(__file__).parents[2]

# A command that leaves something to be ended, as from a terminal, however these tests were started.
CODE = """
import signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from benchmarks import __main__ as entry
def command():
    try:
        print("started", flush=True)
        time.sleep(60)
        print("nobody ended it", flush=True)
    finally:
        print("ended what it started", flush=True)
entry.cli = command
entry.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_or_left_by_its_terminal_it_ends_what_it_started(number: signal.Signals) -> None:
    command = [sys.executable, "-c", CODE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        assert process.stdout.read() == "ended what it started\n"


def test_a_report_of_a_run_that_is_not_there_is_refused_in_plain_words(tmp_path: Path) -> None:
    told = CliRunner().invoke(cli, ["report", str(tmp_path / "none.json")])
    assert (told.exit_code, type(told.exception)) == (2, SystemExit)  # how a wrong argument is told
