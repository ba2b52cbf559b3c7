from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import uvicorn
from uvicorn.supervisors.multiprocess import SIGNALS

from app.settings import Settings
from app.workers import Supervisor, WorkerApp, listen


class Broken(Exception):
    pass


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_supervisor_that_fails_takes_its_workers_with_it(settings: Settings, tmp_path: Path) -> None:
    settings = settings.with_overrides(engine="noop", drain_notice_ms=0)
    config = uvicorn.Config(WorkerApp(settings, tmp_path / "log", os.getpid()), factory=True, log_config=None)
    supervisor = Supervisor(config, [listen("127.0.0.1", 0)], end_timeout_s=20.0, metrics_folder=None)

    def fail() -> None:
        raise Broken

    supervisor.keep_subprocess_alive = fail  # type: ignore[method-assign]
    with pytest.raises(Broken):
        supervisor.run()
    sentinels = [process.process.sentinel for process in supervisor.processes]
    assert sentinels
    assert wait(sentinels, 0) == sentinels
