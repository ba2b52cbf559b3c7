"""Reading request bodies: counted while they arrive, and never before the caller is known."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import Receive

from app.errors import BodyTooLarge, ClientGone, UnsupportedBody, invalid_model

_MAX_COMMAND_BYTES = 4096

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


async def read_command(request: Request, model: type[_M]) -> _M:
    """Read a small JSON body into `model`.

    FastAPI would parse a body parameter before it asks for the token; a route that calls this parses it after.

    Raises:
        UnsupportedBody: Not declared as JSON.
        BodyTooLarge: Over 4 KiB.
        BadRequest: Not JSON.
        InvalidInput: Not what the model takes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedBody("Content-Type must be application/json")
    body = await read_body(request.receive, None, _MAX_COMMAND_BYTES)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_model(error) from None


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI request body of a route that calls `read_command`."""
    return {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}


def _exceeds(content_length: bytes, max_body_bytes: int) -> bool:
    """A length that is no number is the server's to refuse; one of a hundred digits is not worth converting."""
    return len(content_length) > 18 or (content_length.isdigit() and int(content_length) > max_body_bytes)
