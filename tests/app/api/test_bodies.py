from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.requests import Request

from app.api.bodies import read_body, read_command, single_headers
from app.errors import BadRequest, BodyTooLarge, ClientGone, UnsupportedBody
from serve_app.contract import DeadlineExceeded


class Arriving:
    """A body in parts; counts what was asked for."""

    def __init__(self, *parts: bytes, ends: bool = True) -> None:
        self.messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if ends:
            self.messages.append({"type": "http.request", "body": b"", "more_body": False})
        self.taken = 0

    async def __call__(self) -> Any:
        if self.taken == len(self.messages):
            await asyncio.Event().wait()
        self.taken += 1
        return self.messages[self.taken - 1]


class Command(BaseModel):
    name: str


def request(receive: Arriving, *headers: tuple[bytes, bytes]) -> Request:
    return Request({"type": "http", "headers": list(headers)}, receive)


JSON = (b"content-type", b"application/json")


async def test_parts_are_joined() -> None:
    assert await read_body(Arriving(b"ab", b"", b"c"), None, 3) == b"abc"


async def test_nothing_is_read_of_a_body_that_announces_too_much() -> None:
    arriving = Arriving(b"abcd")
    for length in (b"4", b"9" * 400):
        with pytest.raises(BodyTooLarge):
            await read_body(arriving, length, 3)
    assert arriving.taken == 0


async def test_a_length_that_lies_changes_nothing() -> None:
    arriving = Arriving(*[b"x"] * 100)
    for length in (None, b"1", b"0", b"-1", b"x"):
        with pytest.raises(BodyTooLarge):
            await read_body(arriving, length, 9)
        assert arriving.taken == 10
        arriving.taken = 0


async def test_a_client_that_leaves_midway_is_told_apart() -> None:
    arriving = Arriving(b"a", ends=False)
    arriving.messages.append({"type": "http.disconnect"})
    with pytest.raises(ClientGone):
        await read_body(arriving, None, 9)


async def test_a_command_that_never_comes_is_given_up() -> None:
    with pytest.raises(DeadlineExceeded):
        await read_command(request(Arriving(b'{"name":', ends=False), JSON), Command, timeout_s=0.01)


async def test_a_command_has_a_cap() -> None:
    with pytest.raises(BodyTooLarge):
        await read_command(request(Arriving(b" " * 4097), JSON), Command)
    arriving = Arriving(b"{}")
    with pytest.raises(BodyTooLarge):
        await read_command(request(arriving, JSON, (b"content-length", b"4097")), Command)
    assert arriving.taken == 0


async def test_a_compressed_command_is_not_taken() -> None:
    with pytest.raises(UnsupportedBody):
        await read_command(request(Arriving(b"{}"), JSON, (b"content-encoding", b"gzip")), Command)


NAMES = frozenset({b"content-type", b"accept-encoding", b"traceparent"})


def headers_of(*headers: tuple[bytes, bytes]) -> dict[bytes, bytes]:
    return single_headers({"headers": list(headers)}, NAMES)


def test_a_list_may_come_in_parts() -> None:
    assert headers_of((b"accept-encoding", b"gzip"), (b"accept-encoding", b"deflate, br")) == {
        b"accept-encoding": b"gzip, deflate, br"
    }


def test_a_trace_that_cannot_be_told_is_none() -> None:
    assert headers_of((b"traceparent", b"00-a"), (b"traceparent", b"00-b")) == {b"traceparent": b""}


def test_one_value_given_twice_is_refused() -> None:
    with pytest.raises(BadRequest):
        headers_of(JSON, JSON)


def test_an_underscore_is_no_dash() -> None:
    assert headers_of((b"content_type", b"text/plain"), JSON, (b"content_type", b"text/plain")) == dict([JSON])
