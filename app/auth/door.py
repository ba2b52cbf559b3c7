"""From a request to its `Principal`: one credential, one answer for every failure, few failures per address."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from starlette.types import Scope

from app.auth import api_keys
from app.auth.jws import MAX_TOKEN_CHARS, UnknownKey
from app.auth.principal import Principal, Verifier
from app.errors import TooManyFailures, Unauthenticated
from app.observability.ledger import Ledger

# Why a credential did not count; in metrics and logs only, the answer is always the same.
FAILURES = ("missing", "malformed", "key", "signature", "claims", "expired", "denied", "api_key")
MISSING = "missing"

_LOCAL = "local"
_WINDOW_S = 60.0
_TICK_S = 1e-6  # what adding up intervals may be off
_MAX_WAITING = 64


class FailureLimit:
    """So many failures a minute from one address; a bucket that refills evenly, kept as the time when it is full again.

    Args:
        per_minute: Failures, 1 and up; so many may come at once.
        clock: Monotonic seconds.
        max_addresses: Addresses to remember; the one not seen for longest is forgotten first.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float], max_addresses: int = 10_000) -> None:
        self._interval_s = _WINDOW_S / per_minute
        self._clock = clock
        self._max_addresses = max_addresses
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Seconds until a failure from this address is within the limit; 0 where it is now."""
        now = self._clock()
        full_at = max(self._full_at.get(address, now), now)
        wait_s = full_at + self._interval_s - now - _WINDOW_S
        return wait_s if wait_s > _TICK_S else 0.0

    def spend(self, address: str) -> float:
        """Count a failure; gives what `wait_s` does, and counts nothing where one has to wait."""
        if wait_s := self.wait_s(address):
            return wait_s
        now = self._clock()
        self._full_at[address] = max(self._full_at.get(address, now), now) + self._interval_s
        self._full_at.move_to_end(address)
        if len(self._full_at) > self._max_addresses:
            self._full_at.popitem(last=False)
        return 0.0


class Door:
    """Lets in who has a valid credential.

    Failures are limited by address, so that nobody can try many; a request without any credential tries nothing, is
    refused and not counted. Who has a valid one passes from whatever address, also with a key that has only just come:
    new keys are looked for whoever asks, and their source bounds how often and for how long. Only when many wait for
    that already, those from an address that has failed too often do not: while an issuer hangs, strangers would gather.

    Args:
        tokens: Judges tokens.
        api_keys: Judges API keys.
        limit: Of failures.
        count_failure: Told the reason of every failure, one of `FAILURES`.
        renew: Looks for keys that came since, for a token that names one not known; whether there are any. None where
            keys never change.
    """

    def __init__(
        self,
        tokens: Verifier,
        api_keys: Verifier,
        *,
        limit: FailureLimit,
        count_failure: Callable[[str], None],
        renew: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._tokens = tokens
        self._api_keys = api_keys
        self._limit = limit
        self._count_failure = count_failure
        self._renew = renew
        self._waiting = 0

    async def admit(self, scope: Scope) -> Principal:
        """Who sends this request.

        Raises:
            Unauthenticated: No credential, or none that counts.
            TooManyFailures: The same, from an address that has failed too often.
            IdentityUnavailable: Tokens cannot be judged now.
        """
        try:
            credential = bearer_credential(value for name, value in scope["headers"] if name == b"authorization")
            if credential.startswith(api_keys.PREFIX):
                return self._api_keys.verify(credential)
            try:
                return self._tokens.verify(credential)
            except UnknownKey:
                if not await self._has_new_keys(scope):
                    raise
                return self._tokens.verify(credential)
        except Unauthenticated as error:
            raise self._refusal(error, scope) from None

    async def _has_new_keys(self, scope: Scope) -> bool:
        if self._renew is None or (self._waiting >= _MAX_WAITING and self._limit.wait_s(address_of(scope))):
            return False
        self._waiting += 1
        try:
            return await self._renew()
        finally:
            self._waiting -= 1

    def _refusal(self, error: Unauthenticated, scope: Scope) -> Unauthenticated | TooManyFailures:
        self._count_failure(error.reason)
        Ledger.of(scope).facts["credential"] = error.reason
        wait_s = 0.0 if error.reason == MISSING else self._limit.spend(address_of(scope))
        return TooManyFailures(math.ceil(wait_s)) if wait_s else error


def bearer_credential(authorization: Iterable[bytes]) -> str:
    """The token or API key of the request's Authorization headers.

    Raises:
        Unauthenticated: There is not exactly one such header, or it names another scheme.
    """
    values = list(authorization)
    if not values:
        raise Unauthenticated(MISSING)
    if len(values) > 1 or len(values[0]) > MAX_TOKEN_CHARS + len("Bearer "):
        raise Unauthenticated("malformed")
    scheme, _, credential = values[0].partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated("malformed")
    return credential.decode("latin-1")


def address_of(scope: Scope) -> str:
    """Whose failures are counted together: an IPv4 address, or an IPv6 network of 64 bits, of which one client has all.

    Peers of a Unix socket have no address and count as one.
    """
    client = scope.get("client")
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0] if client else "")
    except ValueError:
        return _LOCAL
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
