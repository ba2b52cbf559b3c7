"""Rules for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from app.local_ray import LOCAL_ENV

# Ray reads these once, when the first test imports it; every driver in this process needs them to join a local Ray.
os.environ.update(LOCAL_ENV)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI runs, everything that tests need is installed: a skip there hides a hole, so it fails.

    What a test printed may be no text at all, half of a pair for example, and has to travel between processes.
    """
    report = yield
    report.sections = [(name, said.encode(errors="backslashreplace").decode()) for name, said in report.sections]
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"
    return report
