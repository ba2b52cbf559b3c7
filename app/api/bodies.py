"""Reading request bodies: counted while they arrive, and never before the caller is known."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import Receive, Scope

from app.api.documents import read_object
from app.errors import BadRequest, BodyTooLarge, ClientGone, UnsupportedBody, invalid_model
from serve_app.contract import DeadlineExceeded

_MAX_COMMAND_BYTES = 4096
_COMMAND_TIMEOUT_S = 2.0

_COMMAND_HEADERS = frozenset({b"content-type", b"content-length", b"content-encoding"})
_LISTS = frozenset({b"accept-encoding"})

_M = TypeVar("_M", bound=BaseModel)


async def read_body(receive: Receive, content_length: bytes | None, max_body_bytes: int) -> bytes:
    """Read the body and stop as soon as it is too large, whatever its length header says.

    Raises:
        BodyTooLarge: More than `max_body_bytes`.
        ClientGone: The client left before the end.
    """
    if content_length is not None and _exceeds(content_length, max_body_bytes):
        raise BodyTooLarge(max_body_bytes)
    parts: list[bytes] = []
    size_bytes = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        size_bytes += len(part)
        if size_bytes > max_body_bytes:
            raise BodyTooLarge(max_body_bytes)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def read_command(
    request: Request, model: type[_M], *, timeout_s: float = _COMMAND_TIMEOUT_S, max_bytes: int = _MAX_COMMAND_BYTES
) -> _M:
    """Read a small JSON body into `model`.

    FastAPI would parse a body parameter before it asks for the token; a route that calls this parses it after.

    Raises:
        UnsupportedBody: Not declared as JSON, or compressed.
        BodyTooLarge: Over `max_bytes`, 4 KiB unless given.
        DeadlineExceeded: Not here within `timeout_s`.
        BadRequest: Not JSON, or a name is given twice.
        InvalidInput: Not what the model takes.
    """
    headers = single_headers(request.scope, _COMMAND_HEADERS)
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedBody("Content-Type must be application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedBody("bodies must come uncompressed here", headers={"Accept-Encoding": "identity"})
    try:
        async with asyncio.timeout(timeout_s):
            body = await read_body(request.receive, headers.get(b"content-length"), max_bytes)
    except TimeoutError:
        raise DeadlineExceeded from None
    try:
        return model.model_validate(read_object(body))
    except ValidationError as error:
        raise invalid_model(error) from None


def single_headers(scope: Scope, names: frozenset[bytes]) -> dict[bytes, bytes]:
    """The headers of these names, by lower-case name; one that may be a list may come in parts.

    Raises:
        BadRequest: A header that has one value is given twice.
    """
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in names:
            found[name] = value if name not in found else _joined(name, found[name], value)
    return found


def _joined(name: bytes, one: bytes, other: bytes) -> bytes:
    """What two headers of one name say together (RFC 9110, section 5.3)."""
    if name == b"traceparent":
        return b""  # W3C Trace Context, section 3.2: a trace that cannot be told begins anew
    if name not in _LISTS:
        raise BadRequest("a header that must be single is given twice")
    return one + b", " + other


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI request body of a route that calls `read_command`."""
    return {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}


def _exceeds(content_length: bytes, max_body_bytes: int) -> bool:
    """A length that is no number is the server's to refuse; one of a hundred digits is not worth converting."""
    return len(content_length) > 18 or (content_length.isdigit() and int(content_length) > max_body_bytes)
