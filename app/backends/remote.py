"""The backend `legacy` as a service of its own: the old FastAPI service, asked over HTTP in its own JSON shape.

    predict ─► Coalescer, 16 requests at a time ─► httpx, to a pinned address ─► the old service
                                                     Prediction or a contract error ◄─┘

Nothing of the service is passed on but numbers: not its errors, not its cookies, not its redirects. Nothing of the
caller reaches it but windows and flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

from app.backends.base import MAX_CALL_WINDOWS, Answer, BackendStatus, Call, ExpiredInQueue
from app.backends.coalesce import Coalescer, Group
from serve_app.contract import (
    CLASSES,
    MEMBERS,
    DeadlineExceeded,
    FloatArray,
    ModelFailed,
    ModelNotFound,
    ModelOutputInvalid,
    NotReady,
    Options,
    Overloaded,
    Prediction,
    ReplicaLost,
    ServingError,
    Unavailable,
)

_log = logging.getLogger(__name__)

MAX_RESPONSE_BYTES = 1 << 20
MAX_GROUP_WINDOWS = 8  # as JSON well under the 1 MiB that services commonly take, and about 1 ms of the loop to write
IDLE_LIMIT_S = 4.0  # uvicorn hangs up after 5 s by default; a connection it is closing must not be used again

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
RESOLVE_TIMEOUT_S = 5.0

Resolve = Callable[[str, int], Awaitable[list[str]]]


class RemoteBackend:
    """Predictions from the old service; calls that wait for a free connection share the next request.

    Args:
        url: Scheme, host and port, `https://old.example:8443`. The name is resolved once, and that address kept.
        path: Of the service's prediction route.
        ca_file: Certificates to trust instead of the public ones, PEM.
        token: Gives the bearer token for the service whenever one is needed, raises `ValueError` when it cannot; None
            where the service asks for none.
        timeout_s: Longest a call may take here, waiting for a connection included.
        max_connections: Most requests under way.
        max_queued_windows: Most windows that may wait before a call and with it.
        max_wait_s: Longest wait for a slot that a call is admitted to.
        resolve: Gives the numeric addresses of a host and port, raises `OSError`.
        clock: Seconds, monotonic.

    Raises:
        ValueError: The address is none that a service can have, or the certificates cannot be read.
    """

    name = "legacy"

    def __init__(
        self,
        url: str,
        *,
        path: str = "/ray-serve/predict",
        ca_file: Path | None = None,
        token: Callable[[], bytes] | None = None,
        timeout_s: float = 0.5,
        max_connections: int = 16,
        max_queued_windows: int = MAX_CALL_WINDOWS,
        max_wait_s: float = 0.5,
        resolve: Resolve | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = httpx.URL(url).copy_with(path=path)
        self._token = token
        self._timeout_s = timeout_s
        self._resolve = resolve or _resolve
        self._clock = clock
        self._addresses = deque(_literal_address(self._url.host))
        self._reason = "untried" if self._addresses else "resolving"
        self._last_status: int | None = None
        self._pinning: asyncio.Task[None] | None = None
        self._http = _client(max_connections, timeout_s, ca_file)
        self._coalescer = Coalescer(
            self._send,
            max_group_windows=MAX_GROUP_WINDOWS,
            max_in_flight=max_connections,
            max_queued_windows=max_queued_windows,
            max_wait_s=max_wait_s,
            clock=clock,
        )

    async def start(self) -> None:
        if not self._addresses:
            self._pinning = asyncio.create_task(self._pin_until_it_works())

    async def stop(self) -> None:
        if self._pinning is not None:
            self._pinning.cancel()
            await asyncio.gather(self._pinning, return_exceptions=True)
        self._coalescer.close()
        await self._http.aclose()

    async def predict(self, call: Call) -> Answer:
        if not self._addresses:
            raise NotReady("the remote service has no address yet")
        if call.version is not None:
            raise ModelNotFound("this arm serves one version, and its name is not known")
        answer = await self._ask(call)
        self._reason = "ok"  # from now on its breaker tells
        return answer

    def is_ready(self, version: str | None = None) -> bool:
        return self._reason == "ok" and version is None

    def status(self) -> BackendStatus:
        return BackendStatus(self._reason == "ok", self._reason, self._describe())

    async def stats(self) -> dict[str, Any]:
        return {**self._describe(), "gateway": self._coalescer.stats()}

    def _describe(self) -> dict[str, Any]:
        return {"last_http_status": self._last_status}

    async def _ask(self, call: Call) -> Answer:
        """Ask within `timeout_s`, and within the caller's deadline where that comes first."""
        limit = self._clock() + self._timeout_s
        if call.deadline <= limit:
            return await self._coalescer.predict(call)
        try:
            return await self._coalescer.predict(replace(call, deadline=limit))
        except ExpiredInQueue:
            raise Overloaded("too many windows wait for the remote service") from None
        except DeadlineExceeded:
            raise Unavailable("the remote service did not answer in time") from None

    async def _send(self, group: Group) -> Prediction:
        started = self._clock()
        request = self._request(encode_request(group), self._addresses[0])
        try:
            with _translated():
                content = await self._receive(request)
        except NotReady:
            self._addresses.rotate(-1)  # a name may have several addresses, of which not every one listens
            raise
        return decode_answer(content, group.n_windows, group.options, elapsed_ms=1e3 * (self._clock() - started))

    def _request(self, body: bytes, address: str) -> httpx.Request:
        """A request to the address itself; the name stays in the Host header and in the check of the certificate."""
        headers = {"Host": self._url.netloc.decode("ascii"), **self._authorization()}
        extensions = {"sni_hostname": self._url.host}
        return self._http.build_request(
            "POST", self._url.copy_with(host=address), content=body, headers=headers, extensions=extensions
        )

    def _authorization(self) -> dict[str, str]:
        if self._token is None:
            return {}
        try:
            return {"Authorization": f"Bearer {self._token().decode('ascii')}"}
        except ValueError as error:
            _log.error("the token for the remote service: %s", error)
            raise NotReady("the token for the remote service cannot be used") from error

    async def _receive(self, request: httpx.Request) -> bytes:
        response = await self._http.send(request, stream=True)
        try:
            self._last_status = response.status_code
            _require_answer(response)
            return await _read_limited(response)
        finally:
            await response.aclose()

    async def _pin_until_it_works(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._addresses:
            try:
                self._addresses.extend(await self._find_addresses())
                self._reason = "untried"
            except (OSError, ValueError) as error:  # a TimeoutError is an OSError
                self._reason = "unresolved" if isinstance(error, OSError) else "address-refused"
                _log.warning("the remote service has no address, next try in %.1f s: %s", backoff_s, error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _find_addresses(self) -> list[str]:
        port = self._url.port or (443 if self._url.scheme == "https" else 80)
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            addresses = await self._resolve(self._url.host, port)
        for address in addresses:
            _require_usable(address)
        return addresses


def encode_request(group: Group) -> bytes:
    """The group in the old service's shape, `{"data", "return_uncertainty", "use_ensemble"}`."""
    batches = [part.windows for part in group.parts]
    return orjson.dumps(
        {
            "data": batches[0] if len(batches) == 1 else np.concatenate(batches),
            "return_uncertainty": group.options.return_uncertainty,
            "use_ensemble": group.options.use_ensemble,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def decode_answer(content: bytes, n_windows: int, options: Options, *, elapsed_ms: float) -> Prediction:
    """Read `{"predictions", "processing_time_ms", "uncertainty"}`.

    Class probabilities and expected returns must be there, and the total uncertainty where there is any; the rest is
    None where the service does not tell it, and so are its model's name and version.

    Args:
        content: What the service sent.
        n_windows: Rows that every array must have.
        options: What was asked for; what was not is dropped.
        elapsed_ms: What the request took: the service's own time cannot have been longer.

    Raises:
        ModelOutputInvalid: Not JSON, not this shape, or with values that cannot be.
    """
    try:
        answer = _object(orjson.loads(content))
    except orjson.JSONDecodeError:
        raise ModelOutputInvalid("the remote service's answer is not JSON") from None
    predictions = _object(answer.get("predictions"))
    # A total is the least that an uncertainty says; without one there is none.
    uncertainty = _object((options.return_uncertainty and answer.get("uncertainty")) or {})
    return Prediction(
        classification_probs=_required(predictions, "classification_probs", n_windows, len(CLASSES)),
        regression_pred=_required(predictions, "regression_pred", n_windows),
        regression_uncertainty=_at_least_zero(_required(uncertainty, "regression_uncertainty", n_windows))
        if uncertainty
        else None,
        aleatoric=_at_least_zero(_floats(uncertainty, "aleatoric", n_windows)),
        epistemic=_at_least_zero(_floats(uncertainty, "epistemic", n_windows)),
        predictive_entropy=_at_least_zero(_floats(uncertainty, "predictive_entropy", n_windows)),
        ensemble_weights=_ensemble_weights(predictions, n_windows) if options.use_ensemble else None,
        features=None,
        model_name=None,
        model_version=None,
        model_time_ms=min(_milliseconds(answer.get("processing_time_ms")), elapsed_ms),
    )


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _misshapen()
    return value


def _floats(fields: dict[str, Any], name: str, *shape: int) -> FloatArray | None:
    """The field as float32 of exactly this shape, None where the service does not tell it."""
    values = fields.get(name)
    if values is None:
        return None
    if not _are_numbers(values, shape):
        raise _misshapen()
    with np.errstate(over="ignore"):  # an infinity is refused with the rest of what is not finite
        return np.array(values, np.float64).astype(np.float32)


def _are_numbers(values: Any, shape: tuple[int, ...]) -> bool:
    """Whether these are lists of exactly this shape, of numbers alone.

    Asked before numpy sees them: of a list of texts it makes an array in which each has the room of the longest.
    """
    if not shape:
        return type(values) in (int, float)  # true and false are neither
    return type(values) is list and len(values) == shape[0] and all(_are_numbers(each, shape[1:]) for each in values)


def _required(fields: dict[str, Any], name: str, *shape: int) -> FloatArray:
    array = _floats(fields, name, *shape)
    if array is None:
        raise _misshapen()
    return array


def _ensemble_weights(predictions: dict[str, Any], n_windows: int) -> FloatArray | None:
    """One row per window; the old model learned one row for all, and such a service sends that alone."""
    weights = predictions.get("ensemble_weights")
    if type(weights) is list and weights and type(weights[0]) is not list:
        weights = [weights] * n_windows
    return _floats({"ensemble_weights": weights}, "ensemble_weights", n_windows, len(MEMBERS))


def _at_least_zero(array: FloatArray | None) -> FloatArray | None:
    if array is not None and (array < 0).any():
        raise ModelOutputInvalid("the remote service's uncertainty is negative")
    return array


def _milliseconds(value: Any) -> float:
    if type(value) not in (int, float) or value < 0:
        raise _misshapen()
    return float(value)


def _misshapen() -> ModelOutputInvalid:
    return ModelOutputInvalid("the remote service's answer has another shape")


def _client(max_connections: int, timeout_s: float, ca_file: Path | None) -> httpx.AsyncClient:
    limits = httpx.Limits(
        max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=IDLE_LIMIT_S
    )
    return httpx.AsyncClient(
        headers={
            "User-Agent": "sluice",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        },
        # One caller's answer must leave nothing behind in another's request.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        timeout=timeout_s,
        limits=limits,
        verify=True if ca_file is None else _trust(ca_file),
        follow_redirects=False,
        trust_env=False,
    )


def _trust(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # an SSLError is one
        raise ValueError(f"the certificates in {ca_file} cannot be read: {error.strerror}") from error


# The service refused what we had checked, or failed at it: another try would fare no better.
_COULD_NOT_COMPUTE = frozenset({400, 413, 415, 422, 500})


def _require_answer(response: httpx.Response) -> None:
    if response.status_code in _COULD_NOT_COMPUTE:
        raise ModelFailed("the remote service could not compute an answer")
    if response.status_code != httpx.codes.OK:
        raise Unavailable("the remote service refused")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ModelOutputInvalid("the remote service's answer is compressed, which was not asked for")


async def _read_limited(response: httpx.Response) -> bytes:
    """The body, counted while it arrives, whatever its length header says."""
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_RESPONSE_BYTES:
            raise ModelOutputInvalid("the remote service's answer is too large")
    return bytes(content)


# Every failure of httpx: the first row that fits holds.
_TRANSLATIONS: tuple[tuple[type[Exception], type[ServingError], str], ...] = (
    (httpx.ConnectError, NotReady, "the remote service cannot be reached"),
    (httpx.ConnectTimeout, NotReady, "the remote service cannot be reached"),
    (httpx.TimeoutException, Unavailable, "the remote service did not answer in time"),
    (httpx.NetworkError, ReplicaLost, "the remote service hung up"),
    (httpx.RemoteProtocolError, ReplicaLost, "the remote service hung up, or speaks no HTTP"),
    (httpx.HTTPError, Unavailable, "the remote service cannot be asked"),
)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        for kind, meaning, detail in _TRANSLATIONS:
            if isinstance(error, kind):
                raise meaning(detail) from error
        raise  # never: the last row holds for all


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _literal_address(host: str) -> list[str]:
    """The host itself where it is a numeric address already, else nothing. Raises `ValueError` for a refused one."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return []
    _require_usable(host)
    return [host]


def _require_usable(address: str) -> None:
    """Refuse what is no service's address: link-local ones are where clouds keep their credentials."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        raise ValueError("the remote service's address is link-local, multicast or unspecified")
