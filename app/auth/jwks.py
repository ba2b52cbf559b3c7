"""A JSON Web Key Set (RFC 7517) as we take it: public RSA and P-256 keys for RS256 and ES256, each with its own id.

What an issuer publishes for others (encryption keys, other curves and algorithms) is passed over, as section 5 asks.
What no public set may hold (a private key, a shared secret) or what claims to be for us and is not fit refuses the
whole set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicNumbers
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

from app.auth.jws import decode_canonical
from app.auth.keys import Key, KeySet, is_key_id
from app.auth.strict_json import FOREVER, MALFORMED, parse_object

MAX_JWKS_BYTES = 64 << 10

_MAX_KEYS = 32
_MIN_RSA_BITS, _MAX_RSA_BITS = 2048, 8192
_MIN_EXPONENT, _MAX_EXPONENT = 65537, 1 << 32  # FIPS 186-5, section 5.1, and what a 32-bit implementation can hold
_COORDINATE_BYTES = 32
# RFC 7518, sections 6.2.2, 6.3.2 and 6.4.1.
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class KeysRefused(ValueError):
    """A set of keys is not fit for judging tokens; the message never holds a part of a key."""


def read_jwks(text: bytes) -> KeySet:
    """The usable keys of a JWKS document.

    Args:
        text: At most 64 KiB of JSON.

    Raises:
        KeysRefused: It is no key set, none of its keys is for us, or one of them must not be there.
    """
    if len(text) > MAX_JWKS_BYTES:
        raise KeysRefused(f"a key set may have at most {MAX_JWKS_BYTES} bytes")
    try:
        rows = parse_object(text)["keys"]
    except MALFORMED:
        raise KeysRefused("it is no JSON Web Key Set: an object with a list `keys`") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or len(rows) > _MAX_KEYS:
        raise KeysRefused(f"`keys` must be a list of at most {_MAX_KEYS} objects")
    keys: dict[str | None, Key] = {}
    for place, row in enumerate(rows, 1):
        try:
            _add(keys, row)
        except MALFORMED as error:
            why = str(error) if isinstance(error, KeysRefused) else "a member is missing or of the wrong kind"
            raise KeysRefused(f"key {place} of the set: {why}") from None
    if not keys:
        raise KeysRefused("no key in it is for RS256 or ES256")
    return KeySet(keys)


def _add(keys: dict[str | None, Key], row: dict[str, Any]) -> None:
    if row.get("kty") == "oct" or not _PRIVATE_MEMBERS.isdisjoint(row):
        raise KeysRefused("a key set must hold public keys only")
    build = _builder_of(row)
    if build is None:
        return
    kid = row.get("kid")
    if not isinstance(kid, str) or not is_key_id(kid):
        raise KeysRefused("`kid` must be 1 to 64 letters, digits, hyphens and underscores")
    if kid in keys:
        raise KeysRefused("its `kid` is another key's too")
    operations = row.get("key_ops", ["verify"])
    if operations != ["verify"]:
        raise KeysRefused("`key_ops` must be verify alone")
    keys[kid] = build(row)


def _builder_of(row: dict[str, Any]) -> Callable[[dict[str, Any]], Key] | None:
    """What makes the key of this row; None for one that is not meant for us."""
    kind, algorithm, use = row["kty"], row.get("alg"), row.get("use", "sig")
    if not all(isinstance(value, str) for value in (kind, use)) or not isinstance(algorithm, str | None):
        raise KeysRefused("`kty`, `use` and `alg` must be text")
    if algorithm in {"RS256", "ES256"}:
        if (kind, use) != ("RSA" if algorithm == "RS256" else "EC", "sig"):
            raise KeysRefused(f"it says {algorithm}, and a kind or use that this cannot have")
        return _rsa_key if algorithm == "RS256" else _p256_key
    if algorithm is not None or use != "sig":
        return None
    if kind == "EC":
        return _p256_key if row["crv"] == "P-256" else None
    return _rsa_key if kind == "RSA" else None


def _rsa_key(row: dict[str, Any]) -> Key:
    modulus, exponent = _integer(row["n"]), _integer(row["e"])
    if not _MIN_RSA_BITS <= modulus.bit_length() <= _MAX_RSA_BITS:
        raise KeysRefused(f"an RSA key must have {_MIN_RSA_BITS} to {_MAX_RSA_BITS} bits")
    if modulus % 2 == 0 or exponent % 2 == 0 or not _MIN_EXPONENT <= exponent < _MAX_EXPONENT:
        raise KeysRefused("its modulus and exponent must be odd, the exponent from 65537 to 2^32")
    try:
        public = RSAPublicNumbers(exponent, modulus).public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise KeysRefused("it is no RSA key") from None
    return Key.rs256(public, **_validity(row))


def _p256_key(row: dict[str, Any]) -> Key:
    if row["crv"] != "P-256":
        raise KeysRefused("ES256 is for the curve P-256 alone")
    x, y = decode_canonical(row["x"]), decode_canonical(row["y"])
    if len(x) != _COORDINATE_BYTES or len(y) != _COORDINATE_BYTES:
        raise KeysRefused(f"the coordinates of P-256 have {_COORDINATE_BYTES} bytes each")
    numbers = EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), SECP256R1())
    try:
        public = numbers.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise KeysRefused("its point is not on the curve") from None
    return Key.es256(public, **_validity(row))


def _integer(text: Any) -> int:
    """A Base64urlUInt (RFC 7518, section 2): big-endian, without leading zeros."""
    octets = decode_canonical(text)
    if octets[:1] in (b"", b"\0"):
        raise ValueError("leading zero")
    return int.from_bytes(octets)


def _validity(row: dict[str, Any]) -> dict[str, int]:
    """Our own optional members `nbf` and `exp`: a key can be published before it counts and end by itself."""
    not_before, not_after = row.get("nbf", 0), row.get("exp", FOREVER)
    if type(not_before) is not int or type(not_after) is not int or not 0 <= not_before < not_after <= FOREVER:
        raise KeysRefused("`nbf` and `exp` must be integers, seconds since 1970, the first one earlier")
    return {"not_before": not_before, "not_after": not_after}
