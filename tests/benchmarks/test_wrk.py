"""What wrk is told, and what is read from what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import wrk
from benchmarks.request import Request
from benchmarks.session import UNMEASURED
from benchmarks.wrk import NoWrk, WrkFailed, require_wrk

SAID = """Running 2s test @ http://127.0.0.1:8000
  2 threads and 10 connections

{"us": 2000000, "complete": 1000, "status": 100, "connection": 3, "timeout": 0, "p50": 1500.0, "p90": 2000.0, \
"p99": 9000.0, "max": 12000.5}
"""


def test_only_answers_below_400_are_answered_and_latencies_are_milliseconds() -> None:
    measured = wrk._read(SAID, cpu_s=0.5)
    assert (measured.answered, measured.seconds, measured.answered_rps) == (900, 2.0, 450.0)
    assert measured.failed == {"status": 100, "connection": 3}
    assert measured.latency_ms == {"p50": 1.5, "p90": 2.0, "p99": 9.0, "max": 12.0005}


def test_headers_reach_the_script_whatever_they_hold(tmp_path: Path) -> None:
    script = wrk._lua(Request(1, "POST", "/p", {"X-Odd": 'a "quoted" word'}, b""), tmp_path / "body")
    assert r'wrk.headers["X-Odd"] = "a \"quoted\" word"' in script
    assert 'wrk.method = "POST"' in script


@pytest.mark.parametrize(
    ("command", "reason"), [("echo refused >&2; exit 1", "wrk failed: refused"), ("sleep 9", "did not end")]
)
def test_a_load_that_fails_costs_its_own_figures_and_not_the_run(command: str, reason: str) -> None:
    with pytest.raises(UNMEASURED, match=reason) as failure:
        wrk._run(["sh", "-c", command], timeout_s=0.5)
    assert failure.type is WrkFailed


def test_without_wrk_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoWrk, match="apt-get install wrk"):
        require_wrk()
