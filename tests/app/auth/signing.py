"""Keys, and tokens signed rightly with them whatever they say."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from app.auth import Key, KeySet, TokenVerifier

SECRET = b"pR8-vQ2mZxT5nK0bLw7yHdJ4sGfA9cUeE1iN6oXr3tVq"
NOW = 1_800_000_000
CLAIMS: dict[str, Any] = {
    "iss": "sluice",
    "aud": "sluice",
    "sub": "desk-7",
    "iat": NOW,
    "exp": NOW + 600,
    "scope": "predict ops",
}
HEADER = {"alg": "HS256", "typ": "JWT"}

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Clock:
    """The time of day, set by hand."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@cache
def rsa_key(bits: int = 2048, name: str = "") -> rsa.RSAPrivateKey:
    """An RSA key; the same one for the same name, since making one takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str = "", curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def encode(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def signing_input(header: Any, claims: Any) -> str:
    """Header and claims as they are signed; bytes are taken as they are."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    return ".".join(encode(part) for part in parts)


def sign(header: Any, claims: Any, secret: bytes = SECRET) -> str:
    """A token with a right HMAC-SHA256, whatever header and claims are."""
    message = signing_input(header, claims)
    return f"{message}.{encode(hmac.digest(secret, message.encode(), hashlib.sha256))}"


def sign_with(private: PrivateKey, header: Any, claims: Any) -> str:
    """A token with a right RS256 or ES256 signature, whatever header and claims are."""
    message = signing_input(header, claims)
    return f"{message}.{encode(signature_of(private, message.encode()))}"


def signature_of(private: PrivateKey, message: bytes) -> bytes:
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(message, padding.PKCS1v15(), hashes.SHA256())
    r, s = decode_dss_signature(private.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def algorithm_of(private: PrivateKey) -> str:
    return "RS256" if isinstance(private, rsa.RSAPrivateKey) else "ES256"


def issue(private: PrivateKey, kid: str, **claims: Any) -> str:
    """A token as the issuer whose key this is would give it."""
    return sign_with(private, {"alg": algorithm_of(private), "kid": kid}, claims_with(**claims))


def key_of(private: PrivateKey) -> Key:
    if isinstance(private, rsa.RSAPrivateKey):
        return Key.rs256(private.public_key())
    return Key.es256(private.public_key())


def public_jwk(private: PrivateKey, kid: str, **members: Any) -> dict[str, Any]:
    """The public half as a JSON Web Key; a member given as ... is left out."""
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = private.public_key().public_numbers()
        row = {"kty": "RSA", "n": encode_integer(numbers.n), "e": encode_integer(numbers.e)}
    else:
        point = private.public_key().public_numbers()
        row = {"kty": "EC", "crv": "P-256", "x": encode(point.x.to_bytes(32)), "y": encode(point.y.to_bytes(32))}
    row |= {"kid": kid, "use": "sig", "alg": algorithm_of(private)}
    return {name: value for name, value in (row | members).items() if value is not ...}


def encode_integer(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8))


def jwks(*rows: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(rows)}).encode()


def claims_with(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (CLAIMS | changes).items() if value is not ...}


def verifier_of(clock: Clock, keys: dict[str | None, Key] | None = None, **options: Any) -> TokenVerifier:
    """A verifier of the one secret, unless other keys are given."""
    keys = {None: Key.hs256(SECRET)} if keys is None else keys
    return TokenVerifier(KeySet(keys), issuer="sluice", audience="sluice", wall_clock=clock, **options)
