"""Tells another service of every transition, signed as Standard Webhooks has it (standardwebhooks.com, version 1).

    webhook-id         of the event, the same in every attempt
    webhook-timestamp  of the attempt, seconds since the epoch
    webhook-signature  v1,base64(HMAC-SHA256(secret, id.timestamp.body))

Nothing waits for that service and nothing of it is believed but a status: its answer's body is not read, its redirects
are not followed, and an event that it does not take in time is dropped and counted.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import random
import secrets
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import httpx
import orjson

from app.secret_files import read_webhook_secret
from app.urls import check_address

_LOGGER = logging.getLogger(__name__)

Outcome = Literal["delivered", "queue-full", "gave-up", "gone", "too-large", "stopped"]
Resolve = Callable[[str, int], Awaitable[list[str]]]

_MAX_BODY_BYTES = 20_000
_MAX_WAITING = 100
_ATTEMPT_TIMEOUT_S = 5.0
_EVENT_TIMEOUT_S = 300.0
_FLUSH_S = 1.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0


class Event(NamedTuple):
    """What is sent, and until when that is tried."""

    id: str
    body: bytes
    deadline: float


def sign(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    digest = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


class Webhook:
    """Sends events one after the other, in the order in which they came, from a task of its own.

    Args:
        url: Where to, as `app.urls.check_webhook_url` lets it pass. Its host is looked up for every attempt, and asked
            at the very address that was found to be a possible one.
        secret: Gives the secret's text whenever one is needed; raises `ValueError` when it cannot.
        count: Told what became of each event, one of `Outcome`.
        resolve: Gives the numeric addresses of a host and port, raises `OSError`.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch.
        sleep: Waits so many seconds.
        attempt_timeout_s: Longest time of one attempt, finding the address and connecting included.
        event_timeout_s: Longest time for which one event is tried, waiting for those before it included.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: Callable[[], bytes],
        count: Callable[[Outcome], None] = lambda _: None,
        resolve: Resolve | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        attempt_timeout_s: float = _ATTEMPT_TIMEOUT_S,
        event_timeout_s: float = _EVENT_TIMEOUT_S,
    ) -> None:
        self._url = httpx.URL(url)
        self._secret = secret
        self._count = count
        self._resolve = resolve or _resolve
        self._clock = clock
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._attempt_timeout_s = attempt_timeout_s
        self._event_timeout_s = event_timeout_s
        self._waiting: deque[Event] = deque()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._http = httpx.AsyncClient(
            headers={"User-Agent": "sluice", "Accept-Encoding": "identity"},
            timeout=attempt_timeout_s,
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=False,
        )

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give what waits a second to leave; the rest is dropped."""
        if self._task is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._idle.wait()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _ in range(len(self._waiting)):
            self._drop("stopped")
        self._waiting.clear()
        await self._http.aclose()

    def send(self, event: Mapping[str, Any]) -> None:
        """Have an event sent; returns at once and never fails.

        Args:
            event: JSON-ready, `type` (`rollout.promoted`) and `data`; the time is added.
        """
        try:
            body = orjson.dumps({"timestamp": self._wall_clock(), **event})
        except TypeError:  # orjson's own error is one
            _LOGGER.exception("an event for the webhook is no JSON")
            body = b"x" * (_MAX_BODY_BYTES + 1)
        if len(body) > _MAX_BODY_BYTES:
            self._drop("too-large")
        elif len(self._waiting) >= _MAX_WAITING:
            self._drop("queue-full")
        else:
            self._waiting.append(Event(f"msg_{secrets.token_hex(16)}", body, self._clock() + self._event_timeout_s))
            self._idle.clear()
            self._news.set()

    async def _run(self) -> None:
        while True:
            while self._waiting:
                outcome = await self._deliver(self._waiting[0])
                self._waiting.popleft()
                self._count(outcome) if outcome == "delivered" else self._drop(outcome)
            self._idle.set()
            self._news.clear()
            await self._news.wait()

    async def _deliver(self, event: Event) -> Outcome:
        """Try until it is taken, or its time is over."""
        pause_s = _FIRST_PAUSE_S
        while (left_s := event.deadline - self._clock()) > 0:
            status = await self._attempt(event, min(left_s, self._attempt_timeout_s))
            if status is not None and 200 <= status < 300:
                return "delivered"
            if status == httpx.codes.GONE:  # as the specification has it: nobody wants to be told any more
                return "gone"
            # Jitter keeps several gateways from coming back together.
            await self._sleep(min(pause_s * random.uniform(0.5, 1.0), max(0.0, event.deadline - self._clock())))  # noqa: S311
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        return "gave-up"

    async def _attempt(self, event: Event, timeout_s: float) -> int | None:
        """The status of the answer, None where there was none."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.send(await self._request(event), stream=True)
                await response.aclose()
                return response.status_code
        except (httpx.HTTPError, OSError, ValueError) as error:  # a TimeoutError is an OSError
            _LOGGER.debug("the webhook was not reached: %s", type(error).__name__)
            return None
        except Exception:
            _LOGGER.exception("the webhook was not reached")
            return None

    async def _request(self, event: Event) -> httpx.Request:
        timestamp = int(self._wall_clock())
        headers = {
            "Host": self._url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "webhook-id": event.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(read_webhook_secret(self._secret()), event.id, timestamp, event.body),
        }
        url = self._url.copy_with(host=await self._address())
        extensions = {"sni_hostname": self._url.host}
        return self._http.build_request("POST", url, content=event.body, headers=headers, extensions=extensions)

    async def _address(self) -> str:
        """A possible address of the host. Raises `OSError`, `ValueError`."""
        port = self._url.port or (443 if self._url.scheme == "https" else 80)
        addresses = await self._resolve(self._url.host, port)
        for address in addresses:
            check_address(address)
        return random.choice(addresses)  # noqa: S311  # of several, not every one may listen

    def _drop(self, outcome: Outcome) -> None:
        _LOGGER.warning("an event for the webhook is dropped: %s", outcome)
        self._count(outcome)


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
