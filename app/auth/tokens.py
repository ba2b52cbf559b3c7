"""From a signed token to a `Principal`: every claim required, typed and bounded; and the way to make such a token."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jose import jws as jose_jws

from app.auth.denied import Denied
from app.auth.jws import key_of, take_apart
from app.auth.keys import Key, KeySet
from app.auth.principal import Principal, read_models, read_name, read_optional_name, read_scopes
from app.auth.strict_json import MALFORMED, parse_object, read_time
from app.errors import IdentityUnavailable, Unauthenticated

LEEWAY_S = 30
MAX_LIFETIME_S = 24 * 3600


class _Verified(NamedTuple):
    """What a token says, and when that counts: from `valid_from` up to, not with, `valid_until`, epoch seconds."""

    principal: Principal
    token_id: str | None
    valid_from: int
    valid_until: int

    def counts_at(self, now: float) -> bool:
        return self.valid_from <= now < self.valid_until


class TokenVerifier:
    """Turns bearer tokens into principals; remembers the ones it has verified.

    A remembered token is judged by the clock anew, so remembering changes what a verdict costs and never the verdict.

    Args:
        keys: Keys that may sign; None until they are known.
        issuer: The only `iss` that counts.
        audience: The only `aud` that counts; lists of audiences are refused.
        wall_clock: Seconds since the epoch.
        cache_size: Verified tokens to remember. Only tokens that counted are, by hash, and a canonical token has one
            spelling, so nobody can fill the cache with variants of one token.
    """

    def __init__(
        self,
        keys: KeySet | None,
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
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._denied: Denied | None = {}

    def replace_denied(self, denied: Denied | None) -> None:
        """Refuse these tokens from now on; None while it is not known which."""
        self._denied = denied

    def replace_keys(self, keys: KeySet | None) -> None:
        """Judge by these keys from now on; what the old ones have verified is forgotten in the same step."""
        self._keys = keys
        self._verified = OrderedDict()

    def verify(self, token: str) -> Principal:
        """The principal of a token.

        Raises:
            Unauthenticated: The token does not count, for whatever reason; `UnknownKey` where it is the key's id.
            IdentityUnavailable: No keys are known, or not which tokens are denied.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._verified.get(digest)
        if known is None:
            known = self._verified[digest] = self._read(token)
            if len(self._verified) > self._cache_size:
                self._verified.popitem(last=False)
        elif known.counts_at(self._wall_clock()):
            self._verified.move_to_end(digest)
        else:
            del self._verified[digest]
            raise Unauthenticated("expired")
        if self._denied is None:
            raise IdentityUnavailable
        if known.token_id is not None and self._wall_clock() < self._denied.get(known.token_id, 0):
            raise Unauthenticated("denied")
        return known.principal

    def _read(self, token: str) -> _Verified:
        signed = take_apart(token)
        if self._keys is None:
            raise IdentityUnavailable
        key = key_of(signed, self._keys)
        try:
            verified = self._read_claims(parse_object(signed.payload), key)
        except MALFORMED:
            raise Unauthenticated("claims") from None
        if not verified.counts_at(self._wall_clock()):
            raise Unauthenticated("expired")
        return verified

    def _read_claims(self, claims: dict[str, Any], key: Key) -> _Verified:
        if claims["iss"] != self._issuer or claims["aud"] != self._audience:
            raise ValueError("issuer or audience")
        principal = Principal(
            subject=read_name(claims["sub"]),
            tenant=read_optional_name(claims.get("tenant")),
            scopes=read_scopes(claims["scope"]),
            models=read_models(claims["models"]) if "models" in claims else None,
        )
        return _Verified(principal, read_name(claims["jti"]) if "jti" in claims else None, *_validity(claims, key))


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
    models: Iterable[str] | None = None,
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
        models: The only models it may use; None for every model.

    Raises:
        ValueError: A value that the verifier would refuse.
    """
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise ValueError(f"a token may live for 1 to {MAX_LIFETIME_S} seconds")
    claims: dict[str, Any] = {
        "iss": issuer,
        "aud": audience,
        "sub": read_name(subject),
        "iat": int(now),
        "exp": int(now) + lifetime_s,
        "jti": secrets.token_urlsafe(16),
        "scope": " ".join(scopes),
    }
    read_scopes(claims["scope"])
    if tenant is not None:
        claims["tenant"] = read_name(tenant)
    if models is not None:
        claims["models"] = list(models)
        read_models(claims["models"])
    token = str(jose_jws.sign(claims, Key.hs256(secret).jose_key, algorithm="HS256"))
    take_apart(token)
    return token


def _validity(claims: dict[str, Any], key: Key) -> tuple[int, int]:
    """From when until when the token counts, with the leeway for clocks that differ; a key's own times have none.

    `exp` is not part of its token's life (RFC 7519, section 4.1.4), `nbf` is.
    """
    issued_at, expires_at = read_time(claims["iat"]), read_time(claims["exp"])
    not_before = read_time(claims.get("nbf", issued_at))
    if not 0 < expires_at - issued_at <= MAX_LIFETIME_S:
        raise ValueError("lifetime")
    valid_from = max(issued_at, not_before) - LEEWAY_S
    return max(valid_from, key.not_before), min(expires_at + LEEWAY_S, key.not_after)
