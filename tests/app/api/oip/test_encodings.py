from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.oip.encodings import deflate, inflate, request_coding, response_coding
from app.errors import BadRequest, BodyTooLarge, UnsupportedBody

CODINGS = [b"gzip", b"deflate"]


@pytest.mark.parametrize("coding", CODINGS)
@given(body=st.binary(max_size=1000))
def test_what_is_compressed_comes_back(coding: bytes, body: bytes) -> None:
    assert inflate(deflate(body, coding), coding, 1000) == body


def test_the_formats_are_those_of_the_standard_library() -> None:
    assert gzip.decompress(deflate(b"x", b"gzip")) == zlib.decompress(deflate(b"x", b"deflate")) == b"x"
    assert inflate(gzip.compress(b"x"), b"gzip", 1) == inflate(zlib.compress(b"x"), b"deflate", 1) == b"x"


@pytest.mark.parametrize("coding", CODINGS)
def test_the_cap_is_exact(coding: bytes) -> None:
    body = deflate(b"x" * 1000, coding)
    assert len(inflate(body, coding, 1000)) == 1000
    with pytest.raises(BodyTooLarge):
        inflate(body, coding, 999)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_costs_no_more_memory_than_the_cap(coding: bytes) -> None:
    max_bytes = 1 << 20
    bomb = deflate(b"\0" * (50 << 20), coding)
    assert len(bomb) < max_bytes
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            inflate(bomb, coding, max_bytes)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * max_bytes  # what came of it, the rest of the bomb, and the buffer while it grows


@pytest.mark.parametrize("coding", CODINGS)
@given(body=st.binary(max_size=100))
def test_anything_else_is_refused(coding: bytes, body: bytes) -> None:
    with pytest.raises(BadRequest):
        inflate(b"\x01" + body, coding, 1000)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: body + b"x", lambda body: body + body])
def test_what_is_cut_or_followed_by_more_is_refused(coding: bytes, damage: object) -> None:
    with pytest.raises(BadRequest):
        inflate(damage(deflate(b"x" * 100, coding)), coding, 1000)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("header", "coding"),
    [(None, None), (b"identity", None), (b"gzip", b"gzip"), (b" GZIP ", b"gzip"), (b"deflate", b"deflate")],
)
def test_codings_of_requests(header: bytes | None, coding: bytes | None) -> None:
    assert request_coding(header) == coding


@pytest.mark.parametrize("header", [b"", b"br", b"gzip, gzip", b"gzip;q=1", b"\xff"])
def test_other_codings_of_requests_are_not_taken(header: bytes) -> None:
    if header:
        with pytest.raises(UnsupportedBody):
            request_coding(header)
    else:
        assert request_coding(header) is None


@pytest.mark.parametrize(
    ("header", "coding"), [(None, None), (b"gzip", b"gzip"), (b"deflate", b"deflate"), (b"gzip, deflate", None)]
)
def test_codings_of_answers(header: bytes | None, coding: bytes | None) -> None:
    assert response_coding(header) == coding
