"""Raw bytes against a real server: what the parser refuses, and what it would take without end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import uvicorn
from httptools import HttpRequestParser
from uvicorn.server import ServerState

from app.errors import PROBLEM_JSON
from app.http_protocol import (
    LINGER_S,
    MAX_HEAD_BYTES,
    MAX_LATE_BYTES,
    MAX_LINGER_BYTES,
    MAX_WAITING_REQUESTS,
    HttpProtocol,
)
from app.settings import Settings
from app.workers import _config


class Recorder:
    """An application that reads a body, unless it is told not to, and answers what it saw."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self.reads_bodies = True
        self.headers = [(b"content-length", b"2")]
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.n_left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, more = b"", self.reads_bodies
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.n_left += 1
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def app() -> Recorder:
    return Recorder()


@pytest.fixture
def state() -> ServerState:
    return ServerState()


@pytest.fixture
async def port(app: Recorder, state: ServerState) -> AsyncIterator[int]:
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpProtocol(config, state, {}), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for connection in list(state.connections):
        connection.transport.abort()
    await asyncio.sleep(0)


async def ask(port: int, *parts: bytes) -> bytes:
    """Send the parts one after another; all that comes back until the server closes or says nothing for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(read_all(reader))
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.001)  # whoever is cut off in the midst of sending may lose the answer
            if reading.done():
                break
    answer = await reading
    writer.close()
    return answer


async def read_all(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := await asyncio.wait_for(reader.read(65536), 0.5):
            answer += part
    return answer


def problem(answer: bytes) -> dict[str, Any]:
    """The one refusal that an answer consists of."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1 4") == 1
    assert f"content-type: {PROBLEM_JSON}".encode() in head
    assert b"connection: close" in head
    assert b"nosniff" in head
    assert len(body) <= 4096
    return json.loads(body)


HOST = b"Host: a\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\x00\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"QX-MARK / HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /qx-mark HTTP/9.9\r\n" + HOST + b"\r\n",
        b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.1\n" + b"Host: a\n\n",
        b"GET / HTTP/1.1\r\n" + HOST + b" folded\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X\x00: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5, 5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n",
        b"CONNECT /qx-mark HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello",
        b"CONNECT http://a/qx-mark HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://qx-mark/ HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://a@qx-mark/ HTTP/1.1\r\n" + HOST + b"\r\n",
    ],
)
async def test_what_is_no_http_is_a_400_problem_that_quotes_nothing(app: Recorder, port: int, request_: bytes) -> None:
    document = problem(await ask(port, request_))
    assert document["status"] == 400
    assert "qx-mark" not in json.dumps(document).lower()
    assert app.bodies == []


async def test_a_target_may_name_the_gateway_in_full(app: Recorder, port: int) -> None:
    assert b" 200 " in await ask(port, b"GET http://a/path?x HTTP/1.1\r\n" + HOST + b"\r\n")
    assert app.scopes[0]["path"] == "/path"


@pytest.mark.parametrize(
    "bad_chunk", [b"-1\r\nx\r\n", b"0x1\r\nx\r\n", b"g\r\nx\r\n", b"1\r\nxy\r\n", b"1" * 20 + b"\r\n"]
)
async def test_a_body_that_breaks_off_in_nonsense_is_never_taken_for_whole(
    app: Recorder, port: int, bad_chunk: bytes
) -> None:
    head = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert b" 200 " not in await ask(port, head, bad_chunk + b"0\r\n\r\n")
    assert app.bodies == []


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"GET /", b"a" * 4096),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 4096),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 700),
        (b"GET / HTTP/1.1\r\n", b"a" * 4096),
    ],
)
async def test_a_head_that_does_not_end_is_431(app: Recorder, port: int, beginning: bytes, more: bytes) -> None:
    document = problem(await ask(port, beginning, *[more] * 200))
    assert document["status"] == 431
    assert app.scopes == []


async def test_a_long_head_that_ends_is_taken(app: Recorder, port: int) -> None:
    value = b"v" * (MAX_HEAD_BYTES // 2)
    head = b"GET / HTTP/1.1\r\n" + HOST + b"X: " + value
    assert b" 200 " in await ask(port, head[:20], head[20:9000], head[9000:], b"\r\n\r\n")
    assert (b"x", value) in app.scopes[0]["headers"]


async def test_long_bodies_and_pipelined_requests_are_no_head(app: Recorder, port: int) -> None:
    body = b"b" * (4 * MAX_HEAD_BYTES)
    request = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    three = request * 3
    parts = [three[start : start + 50_001] for start in range(0, len(three), 50_001)]
    assert (await ask(port, *parts)).count(b" 200 ") == 3
    assert app.bodies == [body] * 3


CHUNKED = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


async def test_what_follows_a_body_in_chunks_joins_no_headers(app: Recorder, port: int) -> None:
    assert b" 200 " in await ask(port, CHUNKED, b"0\r\nAuthorization: Bearer x\r\nHost: b\r\n\r\n")
    assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize("more", [b"X: a\r\n" * 700, b"a" * 4096])
async def test_headers_behind_a_body_end_or_the_connection_does(app: Recorder, port: int, more: bytes) -> None:
    assert problem(await ask(port, CHUNKED, b"0\r\n", *[more] * 200))["status"] == 431
    assert app.bodies == []


async def test_a_chunk_that_only_describes_itself_ends_the_connection(app: Recorder, port: int) -> None:
    assert problem(await ask(port, CHUNKED, b"1;", *[b"a" * 4096] * 200))["status"] == 431
    assert app.bodies == []


async def test_nonsense_behind_a_request_never_makes_a_second_answer_to_it(app: Recorder, port: int) -> None:
    good = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    for parts in ([good + b"\x00nonsense"], [good + good + b"\x00"], [good, b"\x00"]):
        answer = await ask(port, *parts)
        assert answer.count(b"HTTP/1.1 200") <= parts[0].count(b"GET")
        assert answer.count(b"HTTP/1.1 4") <= 1
        assert not answer.partition(b"HTTP/1.1 4")[2].count(b"HTTP/1.1 200")


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"POST /seen HTTP/1.1\r\n" + HOST + UPGRADE,
        b"POST /seen HTTP/1.1\r\n" + UPGRADE + HOST,
        b"POST /seen HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: x\r\nUPGRADE: websocket\r\n",
        b"POST http://a/seen HTTP/1.1\r\n" + HOST + UPGRADE,
    ],
)
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"Content-Length: %d\r\n\r\n" % len(HIDDEN), HIDDEN),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"),
    ],
)
async def test_a_request_that_asks_for_another_protocol_is_one_request_with_its_body(
    app: Recorder, port: int, head: bytes, framing: bytes, body: bytes
) -> None:
    whole = head + framing + body
    for parts in ([whole], [head + framing, body], [whole[:30], whole[30:-9], whole[-9:]]):
        app.scopes.clear()
        app.bodies.clear()
        answer = await ask(port, *parts, LAST)
        assert answer.count(b"HTTP/1.1 ") == answer.count(b" 200 ") == 2
        assert [scope["path"] for scope in app.scopes] == ["/seen", "/last"]
        assert app.bodies == [HIDDEN, b""]


async def test_it_may_be_the_last_of_its_connection(app: Recorder, port: int) -> None:
    head = b"POST / HTTP/1.1\r\n" + HOST + b"Connection: close, upgrade\r\nUpgrade: x\r\nContent-Length: 5\r\n\r\n"
    for parts in ([head + b"hello"], [head, b"hello"]):
        answer = await ask(port, *parts)
        assert b" 200 " in answer
        assert b"connection: close" in answer
    assert app.bodies == [b"hello", b"hello"]


async def test_it_hides_nothing_of_its_head_and_of_what_follows(app: Recorder, port: int) -> None:
    asking = b"GET /asking?x=1 HTTP/1.1\r\n" + HOST + UPGRADE + b"X:  a b\t\r\n\r\n"
    answer = await ask(port, asking + b"GET /next HTTP/1.1\r\n" + HOST + b"\r\n" + asking + LAST)
    assert answer.count(b"HTTP/1.1 ") == answer.count(b" 200 ") == 4
    assert [scope["path"] for scope in app.scopes] == ["/asking", "/next", "/asking", "/last"]
    for scope in (app.scopes[0], app.scopes[2]):
        assert (scope["method"], scope["query_string"], scope["http_version"]) == ("GET", b"x=1", "1.1")
        assert [name for name, _ in scope["headers"]] == [b"host", b"connection", b"http2-settings", b"x"]
        assert (b"x", b"a b\t") in scope["headers"]


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Length: +5\r\n"],
)
async def test_a_body_without_a_clear_end_is_no_clearer_for_it(app: Recorder, port: int, framing: bytes) -> None:
    request = b"POST / HTTP/1.1\r\n" + HOST + UPGRADE + framing + b"\r\n0\r\n\r\n"
    assert problem(await ask(port, request, GET))["status"] == 400
    assert app.bodies == []


def test_workers_speak_it_with_the_strict_parser(settings: Settings) -> None:
    config = _config(settings, None)
    config.app = Recorder
    config.load()
    assert config.http_protocol_class is HttpProtocol
    protocol = HttpProtocol(config, ServerState(), {}, asyncio.new_event_loop())
    assert isinstance(protocol.parser, HttpRequestParser)
    protocol.loop.close()


GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


async def test_requests_sent_ahead_are_answered_in_turn_up_to_a_bound(app: Recorder, port: int) -> None:
    assert (await ask(port, GET * (1 + MAX_WAITING_REQUESTS))).count(b" 200 ") == 1 + MAX_WAITING_REQUESTS


async def test_with_the_last_of_too_many_the_connection_ends(app: Recorder, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET * 5000)
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.count(b"HTTP/1.1 ") == answer.count(b" 200 ") == len(app.scopes) == 1 + MAX_WAITING_REQUESTS
    assert answer.count(b"connection: close") == 1
    writer.close()


async def test_whoever_keeps_few_waiting_may_go_on(app: Recorder, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(20):
        writer.write(GET * MAX_WAITING_REQUESTS)
        for _ in range(MAX_WAITING_REQUESTS):
            await asyncio.wait_for(reader.readuntil(b"ok"), 10)
    writer.close()
    assert len(app.scopes) == 20 * MAX_WAITING_REQUESTS


class Pipe(asyncio.Transport):
    """A connection of which the test says how much of what was written waits; closing waits for that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting_bytes = 0
        self.closing = self.is_cut = self.has_ended = False
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_ended = True

    def resume_reading(self) -> None:
        """Nothing to do: the test feeds the protocol."""

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.is_cut = True
        self.waiting_bytes = 0

    def get_write_buffer_size(self) -> int:
        return self.waiting_bytes


class Timers:
    """The part of a loop that calls later, when the test says so."""

    def __init__(self) -> None:
        self.due: list[Any] = []

    def call_later(self, _delay_s: float, call: Any, *args: Any) -> None:
        self.due.append(partial(call, *args))

    def pass_time(self) -> None:
        due, self.due = self.due, []
        for call in due:
            call()


@pytest.fixture
def connection(app: Recorder) -> tuple[HttpProtocol, Pipe, Timers]:
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    timers, pipe = Timers(), Pipe()
    protocol = HttpProtocol(config, ServerState(), {}, timers)  # type: ignore[arg-type]
    protocol.connection_made(pipe)
    return protocol, pipe, timers


@pytest.mark.parametrize("event", ["pause_writing", "timeout_keep_alive_handler", "on_response_complete"])
def test_a_client_that_takes_nothing_of_its_answers_is_cut_off(
    connection: tuple[HttpProtocol, Pipe, Timers], event: str
) -> None:
    protocol, pipe, timers = connection
    pipe.waiting_bytes = 100
    pipe.closing = event == "on_response_complete"
    getattr(protocol, event)()
    assert not pipe.is_cut
    timers.pass_time()
    assert pipe.is_cut


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(
    connection: tuple[HttpProtocol, Pipe, Timers],
) -> None:
    protocol, pipe, timers = connection
    pipe.waiting_bytes = 5
    protocol.pause_writing()
    while pipe.waiting_bytes:
        pipe.waiting_bytes -= 1
        timers.pass_time()
    assert not pipe.is_cut
    assert timers.due == []


def test_a_connection_without_a_request_yet_outlives_the_server_s_end_by_a_moment(
    connection: tuple[HttpProtocol, Pipe, Timers],
) -> None:
    protocol, pipe, timers = connection
    protocol.shutdown()
    assert not pipe.closing  # it was accepted just now: its first request is on its way
    timers.pass_time()
    assert pipe.closing


# --- closing on a client that is still sending


async def send_whole(port: int, data: bytes) -> bytes:
    """The answer, read by a client that first sends all that it has; raises where the connection is reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await asyncio.wait_for(writer.drain(), 10)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


LARGE = 8 << 20


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % LARGE + bytes(LARGE),
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % (2 * LARGE) + bytes(LARGE),
        b"POST / HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"8000\r\n%b\r\n" % bytes(32768)) * 256,
    ],
)
async def test_an_answer_that_closes_reaches_a_client_that_sends_all_it_has_first(
    app: Recorder, port: int, request_: bytes
) -> None:
    app.reads_bodies = False
    app.headers.append((b"connection", b"close"))
    answer = await send_whole(port, request_)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"ok")


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"\x16\x03\x01\x02\x00", b"a"),
        (b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n", b"a"),
        (b"GET /", b"a"),
        (b"", b"\r\n"),
    ],
)
async def test_a_refusal_of_what_is_no_request_reaches_it_as_well(port: int, start: bytes, more: bytes) -> None:
    assert problem(await send_whole(port, start + more * (LARGE // len(more))))["status"] in {400, 431}


async def test_with_nothing_left_to_come_the_connection_closes_at_once(
    app: Recorder, state: ServerState, port: int
) -> None:
    app.headers.append((b"connection", b"close"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello")
    assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ok")
    assert not state.connections
    writer.close()


async def test_who_waits_for_a_body_that_broke_off_is_told_before_the_connection_is_gone(
    app: Recorder, port: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST / HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"
    )
    assert problem(await asyncio.wait_for(reader.read(), 10))["status"] == 400  # and no word of going on
    assert (len(app.scopes), app.n_left) == (1, 1)
    writer.close()


async def test_in_the_midst_of_an_answer_the_connection_is_cut_instead(
    app: Recorder, state: ServerState, port: int
) -> None:
    app.reads_bodies = False
    app.may_end.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHUNKED)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"nonsense\r\n")
    broken_at = time.monotonic()
    while state.connections:
        await asyncio.sleep(0.001)
    assert time.monotonic() - broken_at < LINGER_S / 2
    assert await read_all(reader) == b""
    app.may_end.set()
    writer.close()


def lingering(connection: tuple[HttpProtocol, Pipe, Timers]) -> tuple[HttpProtocol, Pipe, Timers]:
    """The connection, refused and still open for what the client sends."""
    protocol, pipe, _ = connection
    protocol.data_received(b"\x00 nonsense")
    assert pipe.written.count(b"HTTP/1.1 400") == 1
    assert pipe.has_ended
    assert not pipe.closing
    return connection


def test_a_client_that_never_stops_sending_is_listened_to_for_a_while_only(
    connection: tuple[HttpProtocol, Pipe, Timers],
) -> None:
    protocol, pipe, timers = lingering(connection)
    refusal = pipe.written
    protocol.data_received(GET)
    assert not pipe.closing
    timers.pass_time()
    assert pipe.closing
    assert pipe.written == refusal


def test_and_for_a_number_of_bytes_only(connection: tuple[HttpProtocol, Pipe, Timers]) -> None:
    protocol, pipe, _ = lingering(connection)
    part = bytes(1 << 20)
    for _ in range(MAX_LINGER_BYTES >> 20):
        protocol.data_received(part)
    assert not pipe.closing
    protocol.data_received(b"x")
    assert pipe.closing


def test_no_client_holds_a_server_that_leaves_by_going_on_to_send(
    connection: tuple[HttpProtocol, Pipe, Timers],
) -> None:
    protocol, pipe, _ = lingering(connection)
    protocol.shutdown()
    assert pipe.closing


def test_a_server_that_leaves_begins_no_such_wait_either(connection: tuple[HttpProtocol, Pipe, Timers]) -> None:
    protocol, pipe, _ = connection
    protocol.shutdown()
    protocol.data_received(b"\x00 nonsense")
    assert b"HTTP/1.1 400" in pipe.written
    assert pipe.closing


async def test_a_client_that_has_its_answer_and_goes_frees_the_connection(
    app: Recorder, state: ServerState, port: int
) -> None:
    app.reads_bodies = False
    app.headers.append((b"connection", b"close"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\nhello")
    assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ok")  # its end is seen at once
    assert len(state.connections) == 1
    writer.close()
    left_at = time.monotonic()
    while state.connections:
        await asyncio.sleep(0.001)
    assert time.monotonic() - left_at < LINGER_S / 2


# --- a body whose request is answered already


CHUNK = b"1000\r\n%b\r\n" % bytes(4096)


async def answered_early(app: Recorder, port: int, framing: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request has its answer and not yet its body."""
    app.reads_bodies = False
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\n" + HOST + framing + b"\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\nok"), 10)
    return reader, writer


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 1000000000"])
@pytest.mark.parametrize("part", [CHUNK, b"1;%b\r\nx\r\n" % (b"a" * 4096)])
async def test_a_body_that_goes_on_without_end_ends_the_connection(
    app: Recorder, port: int, framing: bytes, part: bytes
) -> None:
    reader, writer = await answered_early(app, port, framing)
    for _ in range(MAX_LATE_BYTES // len(part)):
        writer.write(part)
        await writer.drain()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(), 0.1)
    writer.write(part * 2)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_the_rest_of_a_body_is_read_and_the_connection_stays(
    app: Recorder, state: ServerState, port: int
) -> None:
    reader, writer = await answered_early(app, port, b"Transfer-Encoding: chunked")
    (protocol,) = state.connections
    for _ in range(4):  # what is counted for one does not count for the next
        protocol.data_received(CHUNK * (MAX_LATE_BYTES // 2 // len(CHUNK)))
        protocol.data_received(b"0\r\n\r\n")
        protocol.data_received(CHUNKED)
        assert await asyncio.wait_for(reader.readuntil(b"ok"), 10)
    assert len(app.scopes) == 5
    writer.close()


@pytest.mark.parametrize("nonsense", [b"nonsense\r\n", b"1;" + b"a" * (2 * MAX_HEAD_BYTES)])
async def test_nonsense_in_a_body_makes_no_second_answer_to_its_request(
    app: Recorder, port: int, nonsense: bytes
) -> None:
    reader, writer = await answered_early(app, port, b"Transfer-Encoding: chunked")
    writer.write(nonsense)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_a_bad_request_behind_a_good_one_has_an_answer_of_its_own(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    await asyncio.wait_for(reader.readuntil(b"ok"), 10)
    writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n")
    assert problem(await asyncio.wait_for(reader.read(), 10))["status"] == 400
    writer.close()
