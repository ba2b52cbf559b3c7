"""`POST /v2/models/…/infer`: what the hot path needs to speak the protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from starlette.types import Receive, Scope

from app.api.bodies import read_body
from app.api.hot import Asked, Headers
from app.api.oip.codec import Wanted, decode_request, encode_response
from app.api.oip.encodings import deflate, inflate, request_coding, response_coding
from app.errors import BadRequest, UnsupportedBody
from app.observability.ledger import Ledger
from app.rollout.dispatch import Served
from serve_app.contract import ModelNotFound

HEADER_LENGTH = b"inference-header-content-length"

# Triton's synchronous client names no type, its asynchronous one names octets whatever it sends.
_KINDS = frozenset({b"", b"application/json", b"application/octet-stream"})
_DIGITS = re.compile(rb"[0-9]{1,9}")


class _Detail(NamedTuple):
    """What of a request shapes its answer."""

    wanted: Wanted
    coding: bytes | None


class OpenInferenceDialect:
    """The Open Inference Protocol of one model.

    Args:
        model: Its name in paths and answers.
        max_body_bytes: Largest body, as sent and once inflated.
    """

    headers = frozenset({HEADER_LENGTH, b"accept-encoding"})

    def __init__(self, model: str, max_body_bytes: int) -> None:
        self._model = model
        self._max_body_bytes = max_body_bytes

    async def read(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Asked:
        """Read an inference request: JSON, JSON with bytes behind it, or bytes alone."""
        version = self._version(scope["path"])
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() not in _KINDS:
            raise UnsupportedBody("Content-Type must be application/json or application/octet-stream")
        header_bytes = _header_bytes(headers.get(HEADER_LENGTH))
        coding = request_coding(headers.get(b"content-encoding"))
        body = await read_body(receive, headers.get(b"content-length"), self._max_body_bytes)
        if coding is not None:
            body = inflate(body, coding, self._max_body_bytes)
        request = decode_request(body, header_bytes)
        detail = _Detail(request.wanted, response_coding(headers.get(b"accept-encoding")))
        return Asked(request.windows, request.options, version, request.timeout_ms, detail)

    def write(
        self, asked: Asked, served: Served, ledger: Ledger, client_request_id: str | None
    ) -> tuple[bytes, Headers]:
        """An inference response, compressed where the client asks for just that."""
        detail: _Detail = asked.detail
        body, header_bytes = encode_response(served.answer.prediction, detail.wanted, self._model)
        headers = [(b"content-type", b"application/json")]
        if header_bytes is not None:
            headers = [
                (b"content-type", b"application/octet-stream"),
                (HEADER_LENGTH, str(header_bytes).encode()),
            ]
        if detail.coding is None:
            return body, headers
        return deflate(body, detail.coding), [*headers, (b"content-encoding", detail.coding)]

    def _version(self, path: str) -> str | None:
        """The version that the path names: `/v2/models/MODEL[/versions/VERSION]/infer`."""
        _, _, _, model, *version, _ = path.split("/")
        if model != self._model:
            raise ModelNotFound("no such model")
        return version[1] if version else None


def _header_bytes(text: bytes | None) -> int | None:
    if text is None:
        return None
    if not _DIGITS.fullmatch(text):
        raise BadRequest("Inference-Header-Content-Length must be a number of bytes")
    return int(text)
