"""Steady predictions through an edge from several threads, each outcome kept."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping

import httpx

from tests.docker.edge.process import EdgeProcess

WINDOW = bytes(50 * 60 * 4)


class Load:
    """Clients that keep their connection, and clients that make a new one for each request, side by side.

    Args:
        edge: To ask.
        headers: Of every request.
        pause_s: Between two requests of one client.
        n_clients: Of each of the two kinds.
        sends_again: Once, what went out on a kept connection that ended before its answer began. Any server may end an
            idle connection just when a request is on its way there (RFC 9112, 9.3.1 and 9.5).
    """

    def __init__(
        self,
        edge: EdgeProcess,
        headers: Mapping[str, str],
        *,
        pause_s: float = 0.02,
        n_clients: int = 2,
        sends_again: bool = False,
    ) -> None:
        self.outcomes: list[tuple[float, str]] = []  # when, and the status or what went wrong
        self.n_sent_again = 0
        self._edge, self._pause_s, self._sends_again = edge, pause_s, sends_again
        self._headers = {**headers, "Content-Type": "application/octet-stream"}
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i % 2 == 0,)) for i in range(2 * n_clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def counts(self) -> Counter[str]:
        """How often each outcome came."""
        return Counter(outcome for _, outcome in self.outcomes)

    def _run(self, keeps: bool) -> None:
        with self._edge.client(headers=self._headers) as client:
            while not self._ending.wait(self._pause_s):
                self.outcomes.append((time.monotonic(), self._ask(client, keeps)))

    def _ask(self, client: httpx.Client, keeps: bool) -> str:
        headers = {} if keeps else {"Connection": "close"}
        request = client.build_request("POST", "/ray-serve/predict", content=WINDOW, headers=headers)
        try:
            answer = self._send(client, request, again=keeps and self._sends_again)
            answer.read()
            return str(answer.status_code)
        except httpx.HTTPError as error:
            return type(error).__name__

    def _send(self, client: httpx.Client, request: httpx.Request, *, again: bool) -> httpx.Response:
        try:
            return client.send(request, stream=True)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            if not again:
                raise
        self.n_sent_again += 1
        return client.send(request, stream=True)
