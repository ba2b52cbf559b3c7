"""From the Authorization header to a `Principal`: a strict front, then python-jose for the signature alone.

The library is lenient where it matters: it takes junk inside base64, headers it does not understand, tokens without
an audience and times of any type, and throws more than its own errors. So the token's form, header and claims are
read here, and the library only ever sees a canonical token together with one prebuilt key and one algorithm.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jose import jwk, jws
from jose.exceptions import JOSEError

from app.errors import Unauthenticated

LEEWAY_S = 30
MAX_LIFETIME_S = 24 * 3600

_MAX_TOKEN_CHARS = 4096
_MAX_HEADER_CHARS = 512
_MAX_NAME_CHARS = 255
_MAX_SCOPES_CHARS = 1024
_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
_KID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_SCOPES = re.compile(r"[a-z][a-z0-9:._-]{0,63}( [a-z][a-z0-9:._-]{0,63})*", re.ASCII)
_HEADER_NAMES = frozenset({"alg", "typ", "kid", "cty"})
_TYPES = frozenset({"JWT", "at+jwt"})
_MAX_TIME = 1 << 53

# All that the parsers and the library below can throw at a hostile token.
_MALFORMED = (JOSEError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        subject: The token's `sub`.
        tenant: Whom the subject works for; limits are shared by a tenant.
        scopes: What the token allows: `predict`, `ops`, `admin`.
    """

    subject: str
    tenant: str | None = None
    scopes: frozenset[str] = frozenset()

    @property
    def account(self) -> str:
        """Whose quota this request spends; a tenant and a subject of one name stay apart."""
        return f"tenant:{self.tenant}" if self.tenant else f"sub:{self.subject}"


@dataclass(frozen=True, slots=True)
class Key:
    """One key for one algorithm; `jose_key` is prebuilt, so the library never guesses what the bytes are."""

    algorithm: str
    jose_key: Any

    @classmethod
    def hs256(cls, secret: bytes) -> Key:
        return cls("HS256", jwk.construct(secret, "HS256"))


class KeySet:
    """The keys that may have signed a token, by `kid`; the key under None is for tokens without one.

    Raises:
        ValueError: A shared secret beside a public key, which would let the public key's bytes sign as a secret.
    """

    def __init__(self, keys: Mapping[str | None, Key]) -> None:
        families = {key.algorithm.startswith("HS") for key in keys.values()}
        if len(families) > 1:
            raise ValueError("a key set holds either shared secrets or public keys, never both")
        self._keys = dict(keys)

    def get(self, kid: str | None) -> Key:
        """The key of that id. Raises `KeyError`: an unknown id is never tried with other keys."""
        return self._keys[kid]


class TokenVerifier:
    """Turns bearer tokens into principals; remembers the ones it has verified.

    Args:
        keys: Keys that may sign.
        issuer: The only `iss` that counts.
        audience: The only `aud` that counts; lists of audiences are refused.
        wall_clock: Seconds since the epoch.
        cache_size: Verified tokens to remember. Only tokens that counted are, by hash, and a canonical token has one
            spelling, so nobody can fill the cache with variants of one token.
    """

    def __init__(
        self,
        keys: KeySet,
        *,
        issuer: str,
        audience: str,
        wall_clock: Callable[[], float] = time.time,
        cache_size: int = 10_000,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._wall_clock = wall_clock
        self._cache_size = cache_size
        self._verified: OrderedDict[bytes, tuple[Principal, int]] = OrderedDict()

    def verify(self, token: str) -> Principal:
        """The principal of a token.

        Raises:
            Unauthenticated: The token does not count, for whatever reason.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._verified.get(digest)
        if known is not None:
            return self._recall(digest, *known)
        try:
            principal, expires_at = self._read(token)
        except _MALFORMED:
            raise Unauthenticated from None
        self._verified[digest] = principal, expires_at
        if len(self._verified) > self._cache_size:
            self._verified.popitem(last=False)
        return principal

    def _recall(self, digest: bytes, principal: Principal, expires_at: int) -> Principal:
        if expires_at <= self._wall_clock() - LEEWAY_S:
            del self._verified[digest]
            raise Unauthenticated
        self._verified.move_to_end(digest)
        return principal

    def _read(self, token: str) -> tuple[Principal, int]:
        header_part, payload_part, signature_part = _split(token)
        kid, algorithm = _read_header(_decode(header_part))
        key = self._keys.get(kid)
        if algorithm != key.algorithm:
            raise ValueError("algorithm")
        payload = _decode(payload_part)
        _decode(signature_part)
        jws.verify(token, key.jose_key, algorithms=[key.algorithm])
        return self._read_claims(_parse(payload))

    def _read_claims(self, claims: dict[str, Any]) -> tuple[Principal, int]:
        if claims["iss"] != self._issuer or claims["aud"] != self._audience:
            raise ValueError("issuer or audience")
        expires_at = self._check_times(claims)
        tenant = claims.get("tenant")
        if "jti" in claims:
            _name(claims["jti"])
        principal = Principal(
            subject=_name(claims["sub"]),
            tenant=None if tenant is None else _name(tenant),
            scopes=_scopes(claims["scope"]),
        )
        return principal, expires_at

    def _check_times(self, claims: dict[str, Any]) -> int:
        now = self._wall_clock()
        issued_at, expires_at = _time(claims["iat"]), _time(claims["exp"])
        not_before = _time(claims.get("nbf", issued_at))
        if max(issued_at, not_before) > now + LEEWAY_S or expires_at <= now - LEEWAY_S:
            raise ValueError("not now")
        if not 0 < expires_at - issued_at <= MAX_LIFETIME_S:
            raise ValueError("lifetime")
        return expires_at


def bearer_token(authorization: Iterable[bytes]) -> str:
    """The token of the request's Authorization headers.

    Raises:
        Unauthenticated: There is not exactly one such header, or it is no bearer token.
    """
    values = list(authorization)
    if len(values) != 1 or len(values[0]) > _MAX_TOKEN_CHARS + len("Bearer "):
        raise Unauthenticated
    scheme, _, token = values[0].partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated
    return token.decode("latin-1")


def mint_token(
    secret: bytes,
    *,
    subject: str,
    scopes: Iterable[str],
    issuer: str,
    audience: str,
    lifetime_s: int,
    now: float,
    tenant: str | None = None,
) -> str:
    """Sign an HS256 token that a verifier with the same secret, issuer and audience takes.

    Args:
        secret: At least 32 random bytes.
        subject: Who will ask; 1 to 255 printable characters.
        scopes: What the token allows.
        issuer: `iss`.
        audience: `aud`.
        lifetime_s: Seconds from now to its end, 1 to 86,400.
        now: Seconds since the epoch.
        tenant: Whom the subject works for.

    Raises:
        ValueError: A value that the verifier would refuse.
    """
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise ValueError(f"a token may live for 1 to {MAX_LIFETIME_S} seconds")
    claims: dict[str, Any] = {
        "iss": issuer,
        "aud": audience,
        "sub": _name(subject),
        "iat": int(now),
        "exp": int(now) + lifetime_s,
        "scope": " ".join(scopes),
    }
    _scopes(claims["scope"])
    if tenant is not None:
        claims["tenant"] = _name(tenant)
    return str(jws.sign(claims, Key.hs256(secret).jose_key, algorithm="HS256"))


def _split(token: str) -> tuple[str, str, str]:
    match = _TOKEN.fullmatch(token) if len(token) <= _MAX_TOKEN_CHARS else None
    if match is None or len(match[1]) > _MAX_HEADER_CHARS:
        raise ValueError("form")
    return match[1], match[2], match[3]


def _decode(part: str) -> bytes:
    """Decode base64url in its one canonical spelling (RFC 7515, section 2; RFC 4648, section 3.5)."""
    decoded = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() != part:
        raise ValueError("not canonical")
    return decoded


def _read_header(text: bytes) -> tuple[str | None, str]:
    header = _parse(text)
    if not _HEADER_NAMES.issuperset(header) or not all(isinstance(value, str) for value in header.values()):
        raise ValueError("header")
    if header.get("typ", "JWT") not in _TYPES:
        raise ValueError("typ")
    kid = header.get("kid")
    if kid is not None and not _KID.fullmatch(kid):
        raise ValueError("kid")
    return kid, header["alg"]


def _parse(text: bytes) -> dict[str, Any]:
    document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("duplicate name")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError("NaN and Infinity are not JSON")


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_NAME_CHARS or not value.isprintable():
        raise ValueError(f"a name must have 1 to {_MAX_NAME_CHARS} printable characters")
    return value


def _time(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_TIME:  # a bool is an int to isinstance
        raise ValueError("a time must be an integer")
    return value


def _scopes(value: Any) -> frozenset[str]:
    if not isinstance(value, str) or len(value) > _MAX_SCOPES_CHARS or not (value == "" or _SCOPES.fullmatch(value)):
        raise ValueError("scopes must be lower-case words")
    return frozenset(value.split())
