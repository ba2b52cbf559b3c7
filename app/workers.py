"""Worker processes under one supervisor, which holds the listening socket and replaces a worker that has died.

    supervisor (uvicorn's) ── the socket ──► worker: the application, its bridge to Ray
        SIGTERM: every worker gives notice, drains and ends     SIGHUP: one new worker after another takes over

The supervisor serves nothing itself, so nothing that a request brings can end it; and while a lone worker is being
replaced, connections wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from app.http_protocol import HttpProtocol
from app.observability.logs import LineWriter, logging_to
from app.parent import end_with_parent
from app.settings import Settings

DRAIN_TIMEOUT_S = 25
_HUNG_S = 20  # a worker whose threads do not run for so long is replaced; its first imports take a while, too
_PATIENCE_S = 12.0  # shorter than that: uvicorn gives a new worker as long before it gives it up


@dataclass(frozen=True, slots=True)
class WorkerApp:
    """Builds the application inside a worker; what it holds travels there by a pipe, never by arguments.

    Attributes:
        settings: What the operator set.
        log_file: Where log lines go; standard error for None.
        patience_s: Most seconds to let pass before taking connections, until every arm is ready.
    """

    settings: Settings
    log_file: Path | None
    patience_s: float = 0.0

    def __call__(self) -> ASGIApp:
        from app.main import create_app  # noqa: PLC0415  # the supervisor need not hold what only workers use

        end_with_parent()
        log = None if self.log_file is None else self.log_file.open("ab")
        return create_app(
            self.settings,
            log_stream=log,
            notice_s=self.settings.drain_notice_ms / 1e3,
            patience_s=self.patience_s,
        )


class Supervisor(Multiprocess):
    """Uvicorn's, but that a worker takes over from others only when its arms are ready; who is alone cannot wait."""

    def init_processes(self) -> None:
        super().init_processes()
        self._let_workers_wait(_PATIENCE_S if self.processes_num > 1 else 0.0)

    def restart_all(self) -> None:
        self._let_workers_wait(_PATIENCE_S)
        super().restart_all()
        self._let_workers_wait(_PATIENCE_S if self.processes_num > 1 else 0.0)

    def _let_workers_wait(self, patience_s: float) -> None:
        assert isinstance(self.config.app, WorkerApp)
        self.config.app = replace(self.config.app, patience_s=patience_s)


def serve(settings: Settings, listener: socket.socket, log_file: Path | None = None) -> int:
    """Run the workers until a signal ends them all.

    Args:
        settings: What the operator set.
        listener: Bound socket.
        log_file: Where log lines go; standard error for None.

    Returns:
        Exit code: 0, or uvicorn's for workers that could not start.
    """
    stream = sys.stderr.buffer if log_file is None else log_file.open("ab")
    with logging_to(LineWriter(stream), settings.log_level):
        supervisor = Supervisor(_config(settings, log_file), sockets=[listener])
        supervisor.run()
    failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
    return STARTUP_FAILURE if failed else 0


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
        WorkerApp(settings, log_file),
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
