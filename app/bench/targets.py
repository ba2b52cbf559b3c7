"""What can be asked: a gateway over HTTP, or the deployment through its handle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools
import orjson

from app.backends.base import Call
from app.backends.ray_serve import RayServeBackend
from app.bench.load import OK, NoTarget, Outcome
from serve_app.contract import FloatArray, Options, ServingError
from serve_app.serve_config import MAX_BATCH_WINDOWS

TIMEOUT = "timeout"
CONNECTION = "connection"
UNREADABLE = "unreadable"

_JOIN_TIMEOUT_S = 60.0
_TOO_MANY = 429


def as_binary(windows: FloatArray) -> tuple[str, bytes]:
    """Content type and body, raw little-endian float32."""
    return "application/octet-stream", windows.astype("<f4").tobytes()


def as_json(windows: FloatArray) -> tuple[str, bytes]:
    """Content type and body, the way people write it."""
    return "application/json", orjson.dumps({"data": windows}, option=orjson.OPT_SERIALIZE_NUMPY)


BODIES = {"binary": as_binary, "json": as_json}


class HttpTarget:
    """`POST /ray-serve/predict` over kept connections, as many as there are callers.

    The client is a thin one, since it shares the machine with what it measures: `httpx` would cost about as much CPU
    as a small gateway.

    Args:
        url: Root of the gateway, `http://` or `https://`.
        token: Bearer token with the scope `predict`.
        inputs: Windows float32[B,F,T] of the requests, used in turn.
        body: Key of `BODIES`.
        timeout_s: Of each request.
    """

    name = "http"

    def __init__(
        self, url: str, token: str, inputs: Sequence[FloatArray], *, body: str = "binary", timeout_s: float = 10.0
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:  # half of an IPv6 address, a port that is none
            raise NoTarget(f"{url!r:.80} is no address") from None
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise NoTarget(f"{url!r:.80} is no http:// or https:// address")
        self._url = url
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        path = f"{parts.path.rstrip('/')}/ray-serve/predict"
        self._requests = [_request(path, parts.netloc, token, *BODIES[body](windows)) for windows in inputs]
        self._n_windows = [len(windows) for windows in inputs]
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def open(self) -> None:
        """Ask once.

        Raises:
            NoTarget: Nobody answers, or the request is refused for what it is.
        """
        try:
            answer = await self._answer(0)
        except (OSError, TimeoutError) as error:
            raise NoTarget(f"no answer from {self._url}: {str(error) or 'timed out'}") from error
        if 300 <= answer.status < 500 and answer.status != _TOO_MANY:
            raise NoTarget(f"{self._url} refuses: {answer.status} {_detail(answer.body)}".rstrip())

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def ask(self, number: int) -> Outcome:
        number %= len(self._requests)
        try:
            answer = await self._answer(number)
        except TimeoutError:  # before OSError, which it is one of
            return Outcome(TIMEOUT)
        except OSError:
            return Outcome(CONNECTION)
        if answer.status != 200:
            return Outcome(str(answer.status), answer.served_by)
        is_whole = _count_predictions(answer.body) == self._n_windows[number]
        return Outcome(OK if is_whole else UNREADABLE, answer.served_by)

    async def _answer(self, number: int) -> _Answer:
        async with asyncio.timeout(self._timeout_s):
            connection = await self._connection()
            try:
                answer = await connection.ask(self._requests[number])
            except BaseException:
                connection.close()  # a late answer must not be taken for that of the next request
                raise
        self._idle.append(connection)
        return answer

    async def _connection(self) -> _Connection:
        while self._idle:
            if (idle := self._idle.pop()).is_open:
                return idle
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls or None)
        return connection


class HandleTarget:
    """One call of the `DeploymentHandle` for each request, from a driver process as the gateway has one.

    Measured is the way through the bridge's socket, Serve's router, the replica and its engine. HTTP, tokens, limits
    and the canary are left out, and so is the gateway's coalescing: every request travels alone.

    Args:
        ray_address: `host:port` of the cluster, or `auto`; this host is a node of it.
        inputs: Windows float32[B,F,T] of the requests, used in turn; B at most 32.
        environment: Variables for the driver process, such as the file of the cluster's token.
        concurrency: Most calls under way.
        timeout_s: Of each request.
    """

    name = "handle"

    def __init__(
        self,
        ray_address: str,
        inputs: Sequence[FloatArray],
        *,
        environment: Mapping[str, str] | None = None,
        concurrency: int,
        timeout_s: float = 10.0,
    ) -> None:
        n_windows = max(len(windows) for windows in inputs)
        if n_windows > MAX_BATCH_WINDOWS:
            raise NoTarget(f"one call of the handle carries at most {MAX_BATCH_WINDOWS} windows")
        self._inputs = inputs
        self._timeout_s = timeout_s
        self._backend = RayServeBackend(
            ray_address,
            max_group_windows=n_windows,  # of requests this large, one fills a call
            max_in_flight=concurrency,
            max_queued_windows=concurrency * n_windows,
            environment=environment,
        )

    async def open(self) -> None:
        """Join the cluster.

        Raises:
            NoTarget: It cannot be joined, or nothing is deployed there.
        """
        await self._backend.start()
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        while not (status := self._backend.status()).ready:
            if time.monotonic() > deadline:
                await self.close()
                raise NoTarget(f"the deployment does not answer after {_JOIN_TIMEOUT_S:.0f} s: {status.reason}")
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        await self._backend.stop()

    async def ask(self, number: int) -> Outcome:
        call = Call(
            windows=self._inputs[number % len(self._inputs)],
            options=Options(),
            deadline=time.monotonic() + self._timeout_s,
            request_id=str(number),
            principal="0" * 16,
        )
        try:
            await self._backend.predict(call)
        except ServingError as error:
            return Outcome(error.code)
        return Outcome(OK, self._backend.name)


class _Answer(NamedTuple):
    status: int
    served_by: str | None
    body: bytes


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection that carries one request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._served_by: str | None = None
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only
        self._waiting: asyncio.Future[_Answer] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionResetError("the connection was closed before the answer"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-served-by":
            self._served_by = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        answer = _Answer(self._parser.get_status_code(), self._served_by, b"".join(self._body))
        self._served_by, self._body = None, []
        if not self._parser.should_keep_alive():
            self.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    async def ask(self, request: bytes) -> _Answer:
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        self.is_open = False
        self._transport.close()


def _request(path: str, host: str, token: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def _count_predictions(body: bytes) -> int | None:
    try:
        return len(orjson.loads(body)["predictions"]["classification_probs"])
    except (ValueError, KeyError, TypeError):
        return None


def _detail(body: bytes) -> str:
    try:
        problem = orjson.loads(body)
        return f"{problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        return ""
