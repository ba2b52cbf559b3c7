from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import SIGNALS

from app.settings import Settings
from app.workers import Supervisor, WorkerApp, listen, serve


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


def test_settings_that_only_a_worker_finds_to_be_no_good_end_the_gateway_with_78_and_one_line_of_each(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings.with_overrides(legacy="off", drain_notice_ms=0)
    assert serve(settings, listen("127.0.0.1", 0)) == os.EX_CONFIG
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines if "nothing can answer" in line["event"]] == [
        "nothing can answer: set RAY_ADDRESS, or GATEWAY_LEGACY=in_process"
    ]
    assert not any("trace" in line for line in lines)


def supervisor_of(monkeypatch: pytest.MonkeyPatch, settings: Settings, *exit_codes: int) -> Supervisor:
    """A supervisor whose workers have ended, one after the other, with these codes."""
    codes = iter(exit_codes)

    class Ended:
        pid = 1

        def __init__(self, *_: object) -> None:
            self.exitcode = next(codes)
            self.process = self

        def is_alive(self) -> bool:
            return False

        def start(self) -> None: ...

        kill = join = start

    monkeypatch.setattr("app.workers.Process", Ended)
    monkeypatch.setattr("uvicorn.supervisors.multiprocess.Process", Ended)
    config = uvicorn.Config(WorkerApp(settings, None, os.getpid()), factory=True, log_config=None)
    supervisor = Supervisor(config, [], end_timeout_s=1.0, metrics_folder=None)
    supervisor.init_processes()
    return supervisor


@pytest.mark.parametrize("code", [os.EX_CONFIG, STARTUP_FAILURE])
def test_a_first_worker_that_cannot_start_ends_the_gateway_with_its_code(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, code: int
) -> None:
    supervisor = supervisor_of(monkeypatch, settings, code)
    supervisor.keep_subprocess_alive()
    assert (supervisor.should_exit.is_set(), supervisor.exit_code) == (True, code)


def test_a_substitute_for_which_the_settings_are_no_good_is_tried_again_and_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    supervisor = supervisor_of(monkeypatch, settings, -signal.SIGKILL, os.EX_CONFIG, os.EX_CONFIG, os.EX_CONFIG)
    for _ in range(3):
        supervisor.keep_subprocess_alive()
    assert (supervisor.should_exit.is_set(), supervisor.exit_code) == (False, 0)
