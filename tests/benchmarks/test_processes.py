"""Whatever a benchmark starts ends with it, whatever it started itself included."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.cpu import command_of, family
from benchmarks.processes import NotUp, free_port, running, wait_until_answered

# Ignores being asked, and has a child in a session of its own.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("started", flush=True)
time.sleep(60)
"""


def test_a_process_that_ignores_the_request_is_killed_with_all_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.processes._END_TIMEOUT_S", 0.5)
    log = tmp_path / "log"
    with running([sys.executable, "-c", STUBBORN], folder=tmp_path, environment={}, log=log) as process:
        deadline = time.monotonic() + 10
        while "started" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        pids = family([process.pid])
        assert len(pids) == 2
    assert not any(map(command_of, pids))


def test_a_server_that_ends_while_starting_is_told_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        running([sys.executable, "-c", "raise SystemExit(3)"], folder=tmp_path, environment={}, log=log) as process,
        pytest.raises(NotUp, match="exit code 3"),
    ):
        wait_until_answered(f"http://127.0.0.1:{free_port()}/", process, timeout_s=30, log=log)
