"""Where the public keys of token issuers come from: a file or a URL, read beside the requests, never on their way.

A set is taken whole or not at all: one that is no good leaves the last good one in force, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from app.auth.file_source import RENEWAL_PATIENCE_S, FileSource
from app.auth.jwks import MAX_JWKS_BYTES, KeysRefused, read_jwks
from app.auth.keys import KeySet
from app.auth.reload import Background, Outcome, SourceRecord
from app.auth.watched_file import WatchedFile

FETCH_TIMEOUT_S = 5.0
MIN_REFRESH_S = 5.0
FIRST_FETCH_PATIENCE_S = 1.0

_WHAT = "tokens"
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
_MAX_AGE = re.compile(r"(?:^|[\s,])max-age=([0-9]{1,9})(?:$|[\s,])", re.ASCII | re.IGNORECASE)
_NOT_KEPT = re.compile(r"(?:^|[\s,])(?:no-store|no-cache)(?:$|[\s,])", re.ASCII | re.IGNORECASE)

CountOutcome = Callable[[str, Outcome, int], None]


class KeyFile(FileSource[KeySet]):
    """A JWKS file; its group and others must not write to it.

    Args:
        path: Of the file.
        take: Told every new set.
        count: Told every outcome, for the metrics.
    """

    def __init__(self, path: Path, take: Callable[[KeySet], None], count: CountOutcome) -> None:
        file = WatchedFile(path, max_bytes=MAX_JWKS_BYTES, forbidden_mode=0o022)
        super().__init__(file, read_jwks, take, SourceRecord(_WHAT, count))


class KeyUrl:
    """A JWKS document behind a URL, fetched when it is due and, seldom, when a token names a key that is not known.

    The issuer's `Cache-Control: max-age` may ask for earlier fetches than the setting, down to one in five seconds.
    Keys that it has not given for long may have been withdrawn without our hearing of it, and are let go.

    Args:
        url: https, or http on loopback.
        take: Told every new set, and None when there is none any more.
        count: Told every outcome, for the metrics.
        refresh_s: Longest time between two fetches.
        max_age_s: Longest time for which keys count after the issuer has last given them.
        tls: Which certificates to trust; the public ones unless given.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        take: Callable[[KeySet | None], None],
        count: CountOutcome,
        *,
        refresh_s: float,
        max_age_s: float,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._take = take
        self._record = SourceRecord(_WHAT, count)
        self._refresh_s = refresh_s
        self._max_age_s = max_age_s
        self._given_at: float | None = None  # None while there are no keys
        self._tls = tls or ssl.create_default_context()
        self._clock = clock
        self._background = Background(self._run)
        self._failures = 0
        self._text = b""
        self._wanted = asyncio.Event()
        self._rests_until: float | None = None  # None while a fetch is under way
        self._fetched = asyncio.Event()

    async def start(self) -> None:
        """Begin, and give an issuer that answers the time to do so, or the first tokens would be told to wait."""
        self._background.start()
        await self._wait_for_fetch(FIRST_FETCH_PATIENCE_S)

    async def stop(self) -> None:
        await self._background.stop()

    async def renew(self) -> bool:
        """Have the set fetched soon, and wait for that as long as a caller can; whether it has brought new keys.

        Fetches keep their distance however many strange tokens come: within it this only asks and does not wait.
        """
        before = self._record.generation
        self._wanted.set()
        if self._rests_until is None or self._clock() >= self._rests_until:
            await self._wait_for_fetch(RENEWAL_PATIENCE_S)
        return self._record.generation != before

    def document(self) -> dict[str, Any]:
        """For `/stats`."""
        return {"source": "url", **self._record.document()}

    async def _wait_for_fetch(self, patience_s: float) -> None:
        """Wait until the fetch that is under way, or the next one, has ended; not longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._fetched.wait()

    async def _run(self) -> None:
        while True:
            await self._rest(await self.fetch())

    async def _rest(self, seconds: float) -> None:
        """Wait for the next fetch: never less than the distance between two, then until it is due or wanted."""
        distance_s = min(seconds, MIN_REFRESH_S)
        self._rests_until = self._clock() + distance_s
        await asyncio.sleep(distance_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - distance_s):
                await self._wanted.wait()

    async def fetch(self) -> float:
        """Fetch the set once and take it when it is good and new; returns the seconds until the next is due."""
        self._rests_until = None
        self._wanted.clear()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                text, due_s = await self._get()
            if text == self._text:
                self._record.mend()
            else:
                keys = await asyncio.to_thread(read_jwks, text)
                self._take(keys)
                self._record.take(len(keys))
                self._text = text
            self._given_at = self._clock()
        except KeysRefused as error:
            return self._note_failure(str(error))
        except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:  # a time-out is an OSError
            return self._note_failure(f"the issuer's URL does not answer: {type(error).__name__}")
        finally:
            self._fetched.set()
            self._fetched = asyncio.Event()
        self._failures = 0
        return due_s

    def _note_failure(self, fault: str) -> float:
        self._record.refuse(fault)
        self._failures += 1
        due_s = min(_FIRST_BACKOFF_S * 2.0 ** min(self._failures - 1, 10), _MAX_BACKOFF_S, self._refresh_s)
        return min(due_s, self._let_go_of_old())

    def _let_go_of_old(self) -> float:
        """Drop keys that were not given for too long; returns the seconds until those in force would be."""
        if self._given_at is None:
            return math.inf
        left_s = self._given_at + self._max_age_s - self._clock()
        if left_s > 0:
            return left_s
        self._given_at, self._text = None, b""
        self._take(None)
        self._record.drop(f"the issuer has not given them for {self._max_age_s:.0f} s")
        return math.inf

    async def _get(self) -> tuple[bytes, float]:
        """The document and the seconds for which it is fresh; a client of its own keeps no cookies between two."""
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        async with (
            httpx.AsyncClient(verify=self._tls, trust_env=False, follow_redirects=False) as client,
            client.stream("GET", self._url, headers=headers, timeout=FETCH_TIMEOUT_S) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise KeysRefused(f"the issuer's URL answered {response.status_code}")
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise KeysRefused("the issuer's URL sent a compressed body, which was not asked for")
            text = b""
            async for chunk in response.aiter_raw():
                text += chunk
                if len(text) > MAX_JWKS_BYTES:
                    raise KeysRefused(f"a key set may have at most {MAX_JWKS_BYTES} bytes")
            return text, self._fresh_s(response.headers.get("cache-control", ""))

    def _fresh_s(self, cache_control: str) -> float:
        """How long the issuer's answer may be kept (RFC 9111, section 5.2.2), within our own bounds."""
        stated = _MAX_AGE.search(cache_control)
        wished_s = float(stated[1]) if stated else self._refresh_s
        if _NOT_KEPT.search(cache_control):
            wished_s = 0.0
        return min(max(wished_s, MIN_REFRESH_S), self._refresh_s)
