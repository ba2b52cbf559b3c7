"""Which arm a caller gets: a pure, sticky decision from a keyed hash.

The hash puts every caller at one fixed point of [0, 1). The canary gets the callers below the canary's
share, so a growing share only ever adds callers: who was moved stays moved, on both sides.
The key keeps callers from choosing their side by choosing their name.
"""

from __future__ import annotations

from hashlib import blake2b


def hash_principal(key: bytes, subject: str) -> str:
    """A stand-in for the subject that may travel and be logged.

    Args:
        key: Secret of 16 to 64 bytes that stays the same over restarts, else callers would change sides.
        subject: Who asks, any length.

    Returns:
        16 hex digits (64 bits) of keyed BLAKE2b (RFC 7693).
    """
    return blake2b(subject.encode("utf-8", "surrogatepass"), key=key, digest_size=8).hexdigest()


def position(principal: str) -> float:
    """The caller's fixed point in [0, 1), from `hash_principal`'s 16 hex digits."""
    # 53 bits fill a float exactly; all 64 could round up to 1.0, which no share may exclude.
    return (int(principal, 16) >> 11) / (1 << 53)


def is_canary(principal: str, fraction: float) -> bool:
    """Whether the caller belongs to the canary while its share is `fraction` (0 = nobody, 1 = everybody)."""
    return position(principal) < fraction
