"""API keys: bearer credentials that do not expire by themselves, known here by a keyed hash alone.

A key is `gk_`, eight characters that name it and 43 that prove it: 256 random bits. At that entropy a fast hash is the
right one: nothing can be guessed, and a slow one would let strangers spend our CPU.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from app.auth.principal import Principal, read_models, read_name, read_optional_name, read_scopes
from app.auth.strict_json import MALFORMED, parse_object, read_time
from app.errors import IdentityUnavailable, Unauthenticated

PREFIX = "gk_"
MAX_KEYS = 10_000
MAX_TABLE_BYTES = 8 << 20

_KEY = re.compile(r"gk_([a-z2-7]{8})_[A-Za-z0-9_-]{43}", re.ASCII)
_ID = re.compile(r"[a-z2-7]{8}", re.ASCII)
_FORMAT = 1
_NOBODY = bytes(hashlib.sha256().digest_size)


class ApiKeysRefused(ValueError):
    """A table of API keys is damaged or does not fit its pepper; the message never holds a part of a key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as it is stored.

    Attributes:
        id: The key's eight characters that are no secret.
        digest: HMAC-SHA256 of the whole key under the pepper.
        principal: Whom it stands for.
        created_at: Seconds since the epoch.
        expires_at: It counts no longer from then on; None for never.
    """

    id: str
    digest: bytes
    principal: Principal
    created_at: int
    expires_at: int | None

    def __repr__(self) -> str:
        return f"ApiKey({self.id})"


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """All keys by their id, and the pepper of their digests."""

    keys: Mapping[str, ApiKey]
    pepper: bytes

    def __repr__(self) -> str:
        return f"ApiKeys({len(self.keys)})"


class ApiKeyVerifier:
    """Turns API keys into principals.

    Args:
        wall_clock: Seconds since the epoch.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._known: ApiKeys | None = ApiKeys({}, secrets.token_bytes(32))
        self._wall_clock = wall_clock

    def replace(self, known: ApiKeys | None) -> None:
        """Judge by these keys from now on; None while it is not known which there are."""
        self._known = known

    def verify(self, credential: str) -> Principal:
        """The principal of an API key.

        An id that nobody has costs as much as one that somebody has.

        Raises:
            Unauthenticated: It has another form, is unknown, wrong or expired.
            IdentityUnavailable: It is not known which keys there are.
        """
        match = _KEY.fullmatch(credential)
        if match is None:
            raise Unauthenticated("malformed")
        if self._known is None:
            raise IdentityUnavailable
        key = self._known.keys.get(match[1])
        digest = digest_of(credential, self._known.pepper)
        if not hmac.compare_digest(digest, _NOBODY if key is None else key.digest) or key is None:
            raise Unauthenticated("api_key")
        if key.expires_at is not None and key.expires_at <= self._wall_clock():
            raise Unauthenticated("expired")
        return key.principal


def digest_of(credential: str, pepper: bytes) -> bytes:
    """HMAC-SHA256 of a key under the pepper."""
    return hmac.digest(pepper, credential.encode("ascii"), "sha256")


def make_key(principal: Principal, pepper: bytes, *, now: float, lifetime_s: int | None) -> tuple[str, ApiKey]:
    """A new key, which nobody can tell again, and what is stored of it.

    Args:
        principal: Whom it shall stand for.
        pepper: At least 32 random bytes.
        now: Seconds since the epoch.
        lifetime_s: Seconds from now to its end; None for no end.

    Raises:
        ValueError: A value that no credential may say.
    """
    key_id = base64.b32encode(secrets.token_bytes(5)).decode().lower()
    credential = f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
    expires_at = None if lifetime_s is None else int(now) + lifetime_s
    key = ApiKey(key_id, digest_of(credential, pepper), principal, int(now), expires_at)
    return credential, _read_row(_row(key))


def read_table(text: bytes, pepper: bytes) -> ApiKeys:
    """The keys of a stored table.

    Args:
        text: As `write_table` wrote it.
        pepper: The one under which their digests were made.

    Raises:
        ApiKeysRefused: The table is damaged, or was made under another pepper.
    """
    try:
        document = parse_object(text)
        rows = document["keys"]
        if document["format"] != _FORMAT or not isinstance(rows, list) or len(rows) > MAX_KEYS:
            raise ValueError("format")
        keys = {key.id: key for key in map(_read_row, rows)}
        mark = bytes.fromhex(document["pepper"])
    except MALFORMED:
        raise ApiKeysRefused("the table of API keys is damaged") from None
    if len(keys) != len(rows):
        raise ApiKeysRefused("the table of API keys holds one id twice")
    if not hmac.compare_digest(mark, _mark_of(pepper)):
        raise ApiKeysRefused("the table of API keys was made with another pepper")
    return ApiKeys(keys, pepper)


def write_table(keys: Iterable[ApiKey], pepper: bytes) -> bytes:
    """The table as it is stored; it holds no key and nothing from which one could be made."""
    rows = [_row(key) for key in keys]
    return json.dumps({"format": _FORMAT, "pepper": _mark_of(pepper).hex(), "keys": rows}, indent=1).encode()


def _mark_of(pepper: bytes) -> bytes:
    """Tells one pepper from another without telling either."""
    return hmac.digest(pepper, b"sluice: this pepper", "sha256")[:8]


def _row(key: ApiKey) -> dict[str, Any]:
    principal = key.principal
    return {
        "id": key.id,
        "digest": key.digest.hex(),
        "subject": principal.subject,
        "tenant": principal.tenant,
        "scopes": " ".join(sorted(principal.scopes)),
        "models": None if principal.models is None else sorted(principal.models),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


def _read_row(row: dict[str, Any]) -> ApiKey:
    digest = bytes.fromhex(row["digest"])
    if not _ID.fullmatch(row["id"]) or len(digest) != len(_NOBODY):
        raise ValueError("id or digest")
    principal = Principal(
        subject=read_name(row["subject"]),
        tenant=read_optional_name(row["tenant"]),
        scopes=read_scopes(row["scopes"]),
        models=None if row["models"] is None else read_models(row["models"]),
    )
    expires_at = None if row["expires_at"] is None else read_time(row["expires_at"])
    return ApiKey(row["id"], digest, principal, read_time(row["created_at"]), expires_at)
