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
MAX_FETCHES_AT_ONCE = 2
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


class FetchPace:
    """How often an issuer may be asked before that is due: twice in a row, then once in five seconds.

    A bucket that refills evenly, kept as the time when it is full again. A stranger who sends an unknown key's token
    every five seconds takes what flows in, and one fetch is left for a key that came just after the last.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._full_at = -math.inf

    def wait_s(self) -> float:
        """Seconds until an early fetch is within the pace; 0 where one is now."""
        return max(0.0, self._full_at - (MAX_FETCHES_AT_ONCE - 1) * MIN_REFRESH_S - self._clock())

    def spend(self) -> None:
        """Count an early fetch."""
        self._full_at = max(self._full_at, self._clock()) + MIN_REFRESH_S


class KeyUrl:
    """A JWKS document behind a URL, fetched when it is due and, seldom, when a token names a key that is not known.

    The issuer's `Cache-Control: max-age` may ask for earlier fetches than the setting, down to one in five seconds, and
    strange tokens cause 14 more in a minute at most (`FetchPace`). Keys that it has not given for long may have been
    withdrawn without our hearing of it, and are let go.

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
        self._pace = FetchPace(clock)
        self._wanted = asyncio.Event()
        self._begun = self._ended = 0  # fetches
        self._fetched = asyncio.Event()

    async def start(self) -> None:
        """Begin, and give an issuer that answers the time to do so, or the first tokens would be told to wait."""
        self._background.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_FETCH_PATIENCE_S):
                await self._fetched.wait()

    async def stop(self) -> None:
        await self._background.stop()

    async def renew(self) -> bool:
        """Have the set fetched soon, and wait for that as long as a caller can; whether it has brought new keys.

        Fetches keep their pace however many strange tokens come: where none is to be had this only asks and does not
        wait. One that is under way may have read the issuer's answer of before, so the next is waited for too.
        """
        generation, fetch = self._record.generation, self._begun + 1
        self._wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENEWAL_PATIENCE_S):
                while self._record.generation == generation and self._ended < fetch and self._comes_soon():
                    await self._fetched.wait()
        return self._record.generation != generation

    def document(self) -> dict[str, Any]:
        """For `/stats`."""
        return {"source": "url", **self._record.document()}

    def _comes_soon(self) -> bool:
        """Whether a fetch is under way, or begins now that one is wanted."""
        return self._begun > self._ended or not self._pace.wait_s()

    async def _run(self) -> None:
        while True:
            await self._rest(await self.fetch())

    async def _rest(self, seconds: float) -> None:
        """Wait until the next fetch is due, or is wanted and within the pace."""
        wait_s = self._pace.wait_s()
        if wait_s >= seconds:
            await asyncio.sleep(seconds)
            return
        await asyncio.sleep(wait_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - wait_s):
                await self._wanted.wait()
                self._pace.spend()

    async def fetch(self) -> float:
        """Fetch the set once and take it when it is good and new; returns the seconds until the next is due."""
        self._begun += 1
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
            self._ended += 1
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
