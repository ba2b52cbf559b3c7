"""Two real gateways that share a real Redis and tell one receiver of what they change."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from serve_app.contract import N_FEATURES, N_STEPS
from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer

WINDOW = np.zeros((1, N_FEATURES, N_STEPS), "<f4").tobytes()
WORKERS = {"one": 2, "other": 1}
PROMISED_S = 1.0

T = TypeVar("T")


class Receiver:
    """A real HTTP server that takes events, after it hung or failed for as long as it is told to."""

    def __init__(self) -> None:
        self.attempts: list[tuple[dict[str, str], bytes, int]] = []
        self.status = 204
        self.answers = threading.Event()
        self.answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(receiver) -> type[BaseHTTPRequestHandler]:  # noqa: N805  # the handler's own self is another
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.answers.wait(30)
                status = receiver.status
                receiver.attempts.append(({k.lower(): v for k, v in self.headers.items()}, body, status))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        return Handler


class Gateways:
    """The first has two workers, the second one.

    Args:
        folder: Each has its own in it.
        redis: That they share.
        receiver: Of their events.
    """

    def __init__(self, folder: Path, redis: RedisServer, receiver: Receiver) -> None:
        self._folder = folder
        self._secret = secrets.token_urlsafe(48)
        self.hook_key = secrets.token_bytes(32)
        hook_secret = folder / "hook.secret"
        hook_secret.touch(mode=0o600)
        hook_secret.write_bytes(b"whsec_" + base64.b64encode(self.hook_key))
        self._environment = {
            "GATEWAY_ENGINE": "noop",
            "GATEWAY_RAY_SERVE_FRACTION": "0.0",
            "GATEWAY_INSTANCES": "2",
            "GATEWAY_STICKY_KEY": secrets.token_hex(16),
            "GATEWAY_WEBHOOK_URL": receiver.url,
            "GATEWAY_WEBHOOK_SECRET_FILE": str(hook_secret),
            "REDIS_URL": redis.url,
        }
        self._processes = {name: self._begin(name) for name in WORKERS}
        self._wait(*WORKERS)
        # A connection for each request: any worker may get it.
        self._http = httpx.Client(timeout=10, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    @property
    def one(self) -> GatewayProcess:
        return self._processes["one"]

    @property
    def other(self) -> GatewayProcess:
        return self._processes["other"]

    def named(self, name: str) -> GatewayProcess:
        return self._processes[name]

    def begin_again(self, name: str) -> None:
        """Start a gateway that has ended, or end it first."""
        self._processes[name].stop()
        self._processes[name] = self._begin(name)
        self._wait(name)

    def stop(self) -> None:
        self._http.close()
        for process in self._processes.values():
            process.stop()

    def audit_log(self, name: str) -> Path:
        return self._folder / name / ".run" / "state" / "audit.jsonl"

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_log(name).read_text().splitlines()]

    def ask(self, gateway: GatewayProcess, symbol: str = "MSFT", subject: str = "desk") -> int:
        """The status of a prediction."""
        headers = {"Content-Type": "application/octet-stream", "X-Symbol": symbol}
        headers |= gateway.headers("predict", subject)
        return self._http.post(f"{gateway.url}/ray-serve/predict", content=WINDOW, headers=headers).status_code

    def all_say(self, gateway: GatewayProcess, status: int, symbol: str = "MSFT", looks: int = 16) -> bool:
        return all(self.ask(gateway, symbol) == status for _ in range(looks))

    def rollout(self, gateway: GatewayProcess) -> dict[str, Any]:
        """What a worker of the gateway says is in force."""
        return dict(self._http.get(f"{gateway.url}/rollout", headers=gateway.headers("ops")).json())

    def say(self, gateway: GatewayProcess, method: str, path: str, **body: Any) -> httpx.Response:
        """What an administrator asks for."""
        return self._http.request(method, f"{gateway.url}{path}", json=body, headers=gateway.headers("ops admin"))

    def _begin(self, name: str) -> GatewayProcess:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        environment = {**self._environment, "GATEWAY_WORKERS": str(WORKERS[name])}
        return GatewayProcess(folder, environment, secret=self._secret)

    def _wait(self, *names: str) -> None:
        for name in names:
            process, workers = self._processes[name], WORKERS[name]
            process.wait_for("legacy")
            wait_until(lambda p=process, n=workers: len(p.worker_pids()) >= n, 30, "all workers")


@contextmanager
def again_and_again(ask: Callable[[], T], threads: int = 2) -> Iterator[list[tuple[float, T]]]:
    """What comes of asking all the time, and when it came; what is raised ends the block with it."""
    answers: list[tuple[float, T]] = []
    faults: list[Exception] = []
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            try:
                answer = ask()
            except Exception as fault:
                faults.append(fault)
                return
            answers.append((time.monotonic(), answer))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield answers
    finally:
        is_over.set()
        for worker in workers:
            worker.join()
    if faults:
        raise faults[0]
