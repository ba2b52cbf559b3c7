"""Compressed bodies: gzip and deflate, no others, and never more than a body may be."""

from __future__ import annotations

import gzip
import zlib

from app.errors import BadRequest, BodyTooLarge, UnsupportedBody

# Content codings of RFC 9110, section 8.4.1, as zlib knows them; "deflate" is the zlib format of RFC 1950.
_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_LEVEL = 1  # float32 values hardly shrink, and the event loop waits for it


def request_coding(content_encoding: bytes | None) -> bytes | None:
    """The coding of a request's body, None for a plain one. Raises `UnsupportedBody` for one that is not taken."""
    coding = (content_encoding or b"identity").strip().lower()
    if coding == b"identity":
        return None
    if coding not in _WINDOW_BITS:
        raise UnsupportedBody("Content-Encoding must be gzip or deflate", headers={"Accept-Encoding": "gzip, deflate"})
    return coding


def response_coding(accept_encoding: bytes | None) -> bytes | None:
    """The coding of an answer: compressed for a client that names one coding and nothing else, as Triton's do.

    HTTP libraries offer a list of codings unasked; compressing for all of them would cost more time than it saves.
    """
    coding = (accept_encoding or b"").strip().lower()
    return coding if coding in _WINDOW_BITS else None


def inflate(body: bytes, coding: bytes, max_bytes: int) -> bytes:
    """Undo a request's coding; memory is bounded by `max_bytes` whatever the body would swell to.

    Raises:
        BodyTooLarge: More than `max_bytes` come of it.
        BadRequest: Damaged, cut short, or followed by something else.
    """
    inflater = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error:
        raise BadRequest("the body is not what its Content-Encoding says") from None
    if len(plain) > max_bytes:
        raise BodyTooLarge(max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise BadRequest("the compressed body is cut short or followed by something else")
    return plain


def deflate(body: bytes, coding: bytes) -> bytes:
    """Apply a response's coding."""
    if coding == b"gzip":
        return gzip.compress(body, _LEVEL, mtime=0)
    return zlib.compress(body, _LEVEL)
