"""`POST /ray-serve/predict` speaks the native protocol: windows as JSON or raw float32, the answer as JSON."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope

from app.api.bodies import read_body
from app.api.codec import decode_float32, decode_json, encode_answer
from app.api.hot import Asked, Headers
from app.errors import BadRequest, UnsupportedBody
from app.observability.ledger import Ledger
from app.rollout.dispatch import Served

_JSON = ((b"content-type", b"application/json"),)


class NativeDialect:
    """The protocol of `/ray-serve/predict`.

    Args:
        max_body_bytes: Largest body.
    """

    headers: frozenset[bytes] = frozenset()

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes

    async def read(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Asked:
        """Read windows as JSON, or as raw float32 with the flags in the query."""
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedBody("bodies must come uncompressed here", headers={"Accept-Encoding": "identity"})
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        query: bytes = scope["query_string"]
        if kind == b"application/octet-stream":
            return Asked(*decode_float32(await self._read_body(headers, receive), query))
        if kind != b"application/json":
            raise UnsupportedBody(
                "Content-Type must be application/json or application/octet-stream",
                headers={"Accept": "application/json, application/octet-stream"},
            )
        if query:
            raise BadRequest("with a JSON body the flags are fields of the body, not of the query")
        return Asked(*decode_json(await self._read_body(headers, receive)))

    def write(
        self, asked: Asked, served: Served, ledger: Ledger, client_request_id: str | None
    ) -> tuple[bytes, Headers]:
        """The answer as JSON."""
        return encode_answer(served, asked.options, ledger, client_request_id), _JSON

    async def _read_body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        return await read_body(receive, headers.get(b"content-length"), self._max_body_bytes)
