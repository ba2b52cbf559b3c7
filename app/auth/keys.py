"""Keys that may sign tokens: one algorithm each, found by their id and never by trying."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jose import jwk
from jose.exceptions import JOSEError

from app.auth.strict_json import FOREVER

_KID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def is_key_id(text: str) -> bool:
    """Whether a key may be named so: letters, digits, hyphens and underscores, 1 to 64 of them."""
    return _KID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Key:
    """One key for one algorithm.

    Attributes:
        algorithm: HS256, RS256 or ES256.
        jose_key: Prebuilt, so that the library never guesses what the bytes are.
        signature_bytes: Length of its signatures (RFC 7518, sections 3.2 to 3.4; RFC 8017, section 8.2.2).
        not_before: It signs nothing earlier, seconds since the epoch.
        not_after: Nor anything from then on.
    """

    algorithm: str
    jose_key: Any
    signature_bytes: int
    not_before: int = 0
    not_after: int = FOREVER

    def __repr__(self) -> str:
        return f"Key({self.algorithm})"

    @classmethod
    def hs256(cls, secret: bytes) -> Key:
        """A shared secret. Raises `ValueError` for what is plainly a key of another kind."""
        try:
            return cls("HS256", jwk.construct(secret, "HS256"), 32)
        except JOSEError:
            raise ValueError("an asymmetric key is no shared secret") from None

    @classmethod
    def rs256(cls, public: RSAPublicKey, *, not_before: int = 0, not_after: int = FOREVER) -> Key:
        return cls("RS256", jwk.construct(public, "RS256"), (public.key_size + 7) // 8, not_before, not_after)

    @classmethod
    def es256(cls, public: EllipticCurvePublicKey, *, not_before: int = 0, not_after: int = FOREVER) -> Key:
        """A point on P-256; its signatures are r and s of 32 bytes each, never DER."""
        return cls("ES256", jwk.construct(public, "ES256"), 64, not_before, not_after)

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature is this key's over the message."""
        return len(signature) == self.signature_bytes and bool(self.jose_key.verify(message, signature))


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

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, kid: str | None) -> Key:
        """The key of that id. Raises `KeyError`: an unknown id is never tried with other keys."""
        return self._keys[kid]
