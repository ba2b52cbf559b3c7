"""A signed token in the one form that is taken here: compact, canonical, with a header of four known names.

Libraries are lenient where it matters: they take junk inside base64, headers they do not understand and more than one
spelling of one token. So form and header are read here, and python-jose only ever sees the signing input and a
signature of the right length, together with one prebuilt key of one algorithm.
"""

from __future__ import annotations

import base64
import re
from typing import NamedTuple

from app.auth.keys import Key, KeySet, is_key_id
from app.auth.strict_json import MALFORMED, parse_object
from app.errors import Unauthenticated

MAX_TOKEN_CHARS = 4096

_MAX_HEADER_CHARS = 512
_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
_HEADER_NAMES = frozenset({"alg", "typ", "kid", "cty"})
_TYPES = frozenset({"JWT", "at+jwt"})


class UnknownKey(Unauthenticated):
    """The token names a key that is not in the set; the set may have grown at its source since."""


class Signed(NamedTuple):
    """A token taken apart; nothing of it is verified yet.

    Attributes:
        kid: Id of the key that is said to have signed it.
        algorithm: What it says it was signed with.
        message: What was signed.
        payload: The claims as they came.
        signature: As bytes.
    """

    kid: str | None
    algorithm: str
    message: bytes
    payload: bytes
    signature: bytes


def take_apart(token: str) -> Signed:
    """The parts of a token of the one form.

    Raises:
        Unauthenticated: It has another form.
    """
    try:
        match = _TOKEN.fullmatch(token) if len(token) <= MAX_TOKEN_CHARS else None
        if match is None or len(match[1]) > _MAX_HEADER_CHARS:
            raise Unauthenticated("malformed")
        kid, algorithm = _read_header(decode_canonical(match[1]))
        message = token[: match.end(2)].encode("ascii")
        return Signed(kid, algorithm, message, decode_canonical(match[2]), decode_canonical(match[3]))
    except MALFORMED:
        raise Unauthenticated("malformed") from None


def key_of(signed: Signed, keys: KeySet) -> Key:
    """The key that has signed, found by the id that the token names.

    Raises:
        UnknownKey: There is none of that id.
        Unauthenticated: The key is of another algorithm, or did not sign this.
    """
    try:
        key = keys.get(signed.kid)
    except KeyError:
        raise UnknownKey("key") from None
    if signed.algorithm != key.algorithm or not key.has_signed(signed.message, signed.signature):
        raise Unauthenticated("signature")
    return key


def decode_canonical(part: str) -> bytes:
    """Decode base64url in its one canonical spelling (RFC 7515, section 2; RFC 4648, section 3.5).

    Raises:
        ValueError: Another alphabet, padding, or bits that the decoder would drop.
    """
    decoded = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() != part:
        raise ValueError("not canonical")
    return decoded


def _read_header(text: bytes) -> tuple[str | None, str]:
    header = parse_object(text)
    if not _HEADER_NAMES.issuperset(header) or not all(isinstance(value, str) for value in header.values()):
        raise ValueError("header")
    if header.get("typ", "JWT") not in _TYPES:
        raise ValueError("typ")
    kid = header.get("kid")
    if kid is not None and not is_key_id(kid):
        raise ValueError("kid")
    return kid, header["alg"]
