"""Worker processes under one supervisor, which holds the listening socket and replaces a worker that has died.

    supervisor (uvicorn's) ── the socket ──► worker: the application, its bridge to Ray
        SIGTERM: every worker gives notice, drains and ends     SIGHUP: one new worker after another takes over

The supervisor serves nothing itself, so nothing that a request brings can end it; and while a lone worker is being
replaced, connections wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from app.http_protocol import HttpProtocol
from app.observability.logs import LineWriter, logging_to
from app.observability.metric_files import forget_worker
from app.parent import end_with_parent
from app.settings import ConfigError, Settings

_log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 25
_END_GRACE_S = 5  # for a worker's own clean-up, after its callers
_LOOK_S = 0.1
_HUNG_S = 20  # a worker whose threads do not run for so long is replaced; its first imports take a while, too
_PATIENCE_S = 12.0  # shorter than that: uvicorn gives a new worker as long before it gives it up


@dataclass(frozen=True, slots=True)
class WorkerApp:
    """Builds the application inside a worker; what it holds travels there by a pipe, never by arguments.

    Attributes:
        settings: What the operator set.
        log_file: Where log lines go; standard error for None.
        supervisor_pid: Process id of the supervisor, without which the worker ends.
        patience_s: Most seconds to let pass before taking connections, until every arm is ready.
        waits_for_keys: Begin although a file of keys is damaged now: whoever takes the place of a worker that died
            must not fail for a file that the others have not heeded either.
    """

    settings: Settings
    log_file: Path | None
    supervisor_pid: int
    patience_s: float = 0.0
    waits_for_keys: bool = False

    def __call__(self) -> ASGIApp:
        from app.main import create_app  # noqa: PLC0415  # imports are a worker's, and slow

        end_with_parent()
        if os.getppid() != self.supervisor_pid:
            sys.exit("the supervisor has ended")  # before the kernel was asked to tell
        log = None if self.log_file is None else self.log_file.open("ab")
        try:
            return create_app(
                self.settings,
                log_stream=log,
                notice_s=self.settings.drain_notice_ms / 1e3,
                patience_s=self.patience_s,
                waits_for_keys=self.waits_for_keys,
            )
        except ConfigError as error:
            with logging_to(LineWriter(log or sys.stderr.buffer), self.settings.log_level):
                _log.error("%s", error)  # no trace, which says nothing to whoever set them
            sys.exit(os.EX_CONFIG)


class Supervisor(Multiprocess):
    """Uvicorn's, with limits to its waits.

    A worker takes over from others only when its arms are ready; who is alone cannot wait. A worker that does not end
    when it should is killed, a signal to end is heeded in the midst of a restart, and the number of workers is the one
    that was set, since limits and shares are divided by it.
    """

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], *, end_timeout_s: float, metrics_folder: Path | None
    ) -> None:
        super().__init__(config, sockets)
        self._end_timeout_s = end_timeout_s
        self._metrics_folder = metrics_folder
        self.exit_code = 0
        self._first: frozenset[Process] = frozenset()
        self._leaving: list[Process] = []
        self.should_exit = _Flag()  # type: ignore[assignment]  # what uvicorn uses of an event
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.should_exit.set())

    def run(self) -> None:
        try:
            super().run()
        except BaseException:
            self.terminate_all()  # or the interpreter would wait for the workers, for ever
            self.join_all()
            raise

    def init_processes(self) -> None:
        super().init_processes()
        self._first = frozenset(self.processes)
        self._prepare_substitutes()

    def keep_subprocess_alive(self) -> None:
        """Put another worker in the place of one that has ended, or hangs; none where workers cannot start at all."""
        for index, process in enumerate(self.processes):
            if self._answers(process) or self.should_exit.is_set():
                continue
            process.kill()
            process.join()
            self._forget(process)
            if self._is_hopeless(process):
                _log.error("a worker could not start; the next one would fare no better")
                self.exit_code = process.exitcode or 0
                self.should_exit.set()
                return
            _log.warning("worker %s ended (%s); starting another", process.pid, process.exitcode)
            self.processes[index] = Process(self.config, self.sockets)
            self.processes[index].start()

    def _is_hopeless(self, ended: Process) -> bool:
        """Whether another worker would end as this one did.

        What was good when the gateway began and is not for a substitute may be mended: whoever runs goes on meanwhile.
        """
        return ended.exitcode == STARTUP_FAILURE or (ended.exitcode == os.EX_CONFIG and ended in self._first)

    def _answers(self, process: Process) -> bool:
        """Whether the worker lives and its threads run; one that dies while it is asked is noticed at once."""
        if not process.process.is_alive():
            return False
        process.parent_conn.send(b"ping")
        deadline = time.monotonic() + _HUNG_S
        while time.monotonic() < deadline and not self.should_exit.is_set():
            ready = wait([process.parent_conn, process.process.sentinel], _LOOK_S)
            if process.parent_conn in ready:
                process.parent_conn.recv()
                return True
            if ready:
                return False
        return False

    def restart_all(self) -> None:
        """Replace one worker after another, each by one that is ready; the first that is not ends it."""
        self._prepare_next(patience_s=_PATIENCE_S, waits_for_keys=False)
        for index, old in enumerate(self.processes):
            new = Process(self.config, self.sockets)
            new.start()
            if not new.wait_until_ready(_HUNG_S, self.should_exit):
                new.kill()
                new.join()
                _log.error("a new worker was not ready in time; the old ones stay")
                break
            self.processes[index] = new
            self._leaving.append(old)
            old.terminate()
            self._await_end(old, unless_asked_to_end=True)
        self._prepare_substitutes()

    def terminate_all(self) -> None:
        for listener in self.sockets:
            listener.close()  # when the last worker has closed it too, callers are refused instead of left waiting
        super().terminate_all()

    def join_all(self) -> None:
        for process in (*self._leaving, *self.processes):
            self._await_end(process)

    def handle_ttin(self) -> None:
        """Not taken: see the class."""

    def handle_ttou(self) -> None:
        """Not taken: see the class."""

    def _await_end(self, leaving: Process, *, unless_asked_to_end: bool = False) -> None:
        deadline = time.monotonic() + self._end_timeout_s
        while leaving.process.is_alive() and not (unless_asked_to_end and self.should_exit.is_set()):
            if time.monotonic() > deadline:
                _log.error("worker %s did not end in time and is killed", leaving.pid)
                leaving.process.kill()
            leaving.process.join(_LOOK_S)
        if not leaving.process.is_alive():
            self._forget(leaving)

    def _forget(self, ended: Process) -> None:
        if self._metrics_folder is not None and ended.pid is not None:
            forget_worker(self._metrics_folder, ended.pid)

    def _prepare_substitutes(self) -> None:
        self._prepare_next(patience_s=_PATIENCE_S if self.processes_num > 1 else 0.0, waits_for_keys=True)

    def _prepare_next(self, *, patience_s: float, waits_for_keys: bool) -> None:
        assert isinstance(self.config.app, WorkerApp)
        self.config.app = replace(self.config.app, patience_s=patience_s, waits_for_keys=waits_for_keys)


class _Flag:
    """As much of an event as a signal handler may set: a real one holds a lock that the handler might meet."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float) -> bool:
        if not self._is_set:
            select.select((), (), (), timeout)
        return self._is_set


def serve(settings: Settings, listener: socket.socket, log_file: Path | None = None) -> int:
    """Run the workers until a signal ends them all.

    Args:
        settings: What the operator set.
        listener: Bound socket.
        log_file: Where log lines go; standard error for None.

    Returns:
        Exit code: 0, or that of a worker that could not start: uvicorn's, or 78 for settings that are no good.
    """
    stream = sys.stderr.buffer if log_file is None else log_file.open("ab")
    with logging_to(LineWriter(stream), settings.log_level):
        supervisor = Supervisor(
            _config(settings, log_file),
            [listener],
            end_timeout_s=settings.drain_notice_ms / 1e3 + DRAIN_TIMEOUT_S + _END_GRACE_S,
            metrics_folder=settings.multiproc_dir,
        )
        supervisor.run()
    return supervisor.exit_code


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket for the workers; port 0 takes a free one. Raises `OSError`."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _config(settings: Settings, log_file: Path | None) -> uvicorn.Config:
    return uvicorn.Config(
        WorkerApp(settings, log_file, os.getpid(), settings.start_patience_ms / 1e3),
        factory=True,
        workers=settings.workers,
        host=settings.host,
        port=settings.port,
        http=HttpProtocol,
        loop="uvloop",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=bool(settings.trusted_proxies),  # else nobody's word is taken for whose request it is
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=75,  # a desk that asks every ten seconds keeps its connection
        timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
        timeout_worker_healthcheck=_HUNG_S,
    )
