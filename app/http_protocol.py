"""HTTP/1.1 as uvicorn speaks it with its stricter parser, with heads that end and refusals in our own form."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.errors import PROBLEM_JSON, BadRequest, GatewayError, HeadTooLarge, problem_of
from app.front import has_its_host

# The parser itself takes a head of any size. A client that sends its head in one go may have sent four times as much.
MAX_HEAD_BYTES = 64 * 1024
MAX_WAITING_REQUESTS = 8
# The rest of a body whose request was refused without it: as little is worth reading to keep the connection.
MAX_LATE_BYTES = 64 * 1024
_STALLED_S = 60.0
_FIRST_REQUEST_S = 1.0  # for whom we accepted in the very moment in which we stopped to

# For a client that is still sending when it has its last answer. What it sends costs a copy in the kernel and nothing
# more; as much as the largest body that a gateway can be set to take is an honest mistake, and more is not.
LINGER_S = 2.0
MAX_LINGER_BYTES = 64 << 20


class _Stop(Exception):
    """Ends the parsing of what has come."""


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    What is no HTTP, or the head of a request that does not end, is refused here: no request comes of it, so nothing
    behind the server ever sees it. Of requests that are sent ahead, some wait for their turn; with the answer to the
    last of them the connection ends, as it may at any time (RFC 9112, section 9.3.2).
    """

    _line: _Line
    _unfinished_bytes = 0
    _late_bytes = 0
    _takes_no_more = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._line = _Line(transport, self.loop)
        super().connection_made(self._line)  # type: ignore[arg-type]  # what it has not, it asks the transport for

    def data_received(self, data: bytes) -> None:
        """Feed the parser; give up on a client that keeps sending and never completes anything."""
        if self._line.lingers:
            self._line.discard(len(data))
            return
        if self._takes_no_more:
            return
        self._unfinished_bytes += len(data)
        super().data_received(data)
        if self._unfinished_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadTooLarge())
        elif self._is_answered_early():
            self._late_bytes += len(data)
            if self._late_bytes > MAX_LATE_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        self._unfinished_bytes = self._late_bytes = 0
        self._line.is_in_request = True
        if len(self.pipeline) >= MAX_WAITING_REQUESTS:
            self.cycle.keep_alive = False  # complete: the next one begins
            self._takes_no_more = True
            raise _Stop
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unfinished_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":  # what follows would be a tunnel's, without a length
                raise _Stop
            return  # comes again, as an ordinary request
        if not has_its_host(self.url, self.headers):
            raise _Stop
        super().on_headers_complete()

    def go_on_without_upgrade(self, rest: bytes) -> None:
        """Read the head that was read last once more, without its wish for another protocol, and what follows it.

        With another parser: one that has seen an upgrade and `Connection: close` reads nothing more.
        """
        start = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = _Parser(self)
        self.parser.feed_data(b"\r\n".join([start, *headers, b"", rest]))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header of the head; one behind a body in chunks would change what was already read and judged."""
        if self.cycle is None or self.cycle.scope is not self.scope:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._unfinished_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished_bytes = 0
        if not self.parser.should_upgrade():
            self._line.is_in_request = False
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not read; its own words stay here."""
        if not self._takes_no_more:
            self._refuse(BadRequest("this is not an HTTP/1.1 request"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def shutdown(self) -> None:
        """End the connection when what is under way is answered; one that is new may send its first request yet."""
        self._line.stop_lingering()
        is_new = self.cycle is None  # whatever its annotation says
        if is_new and not self.transport.is_closing():
            self.loop.call_later(_FIRST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def _expect_reading(self, left_before_bytes: int = 0) -> None:
        """See to it that the client takes what was written; closing alone would wait for that without end."""
        left_bytes: int = self.transport.get_write_buffer_size()
        if left_bytes and left_bytes == left_before_bytes:
            self.transport.abort()
        elif left_bytes:
            self.loop.call_later(_STALLED_S, self._expect_reading, left_bytes)

    def _refuse(self, error: GatewayError) -> None:
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self._line.stop_lingering()  # in the midst of an answer, a second one would be taken for a part of it
        elif not self._is_answered_early():
            self.transport.write(_answer(error))
            self._line.is_in_request = True  # or what might have become one
            self._abandon_request()
        self.transport.close()

    def _is_answered_early(self) -> bool:
        """Whether what comes now is the body of a request that has its answer."""
        cycle = self.cycle
        return self._line.is_in_request and cycle is not None and cycle.response_complete and cycle.scope is self.scope

    def _abandon_request(self) -> None:
        """Tell whoever still waits for the body that it will not come; nothing can be answered any more."""
        if self.cycle is not None:  # whatever its annotation says
            self.cycle.disconnected = True
            self.cycle.message_event.set()


class _Line:
    """A transport that closes gently: a client that is still sending can read first why it should not.

    When a socket is closed with input unread, the kernel resets the connection, and an answer that the client has not
    read yet is lost with it. So our own direction ends first, and what comes is thrown away until the client ends the
    other (RFC 9112, section 9.6), or `LINGER_S` and `MAX_LINGER_BYTES` are used up.

    Args:
        transport: What everything else is asked of.
        loop: For the time.

    Attributes:
        is_in_request: Whether the client has begun a request and not completed it.
        lingers: Whether all that is left is to throw away what comes.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self.write = transport.write  # of every answer: found faster than by `__getattr__`
        self._may_linger = True
        self._discarded_bytes = 0
        self.is_in_request = False
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection, gently where the client is in the midst of a request."""
        if self.is_in_request and self._may_linger and not self.is_closing():
            self._linger()
        elif not self.lingers:
            self._transport.close()

    def discard(self, size_bytes: int) -> None:
        """Count what came while the connection lingers."""
        self._discarded_bytes += size_bytes
        if self._discarded_bytes > MAX_LINGER_BYTES:
            self._transport.close()

    def stop_lingering(self) -> None:
        """Wait for nobody, now and later: a server that leaves is not held by a client that goes on sending."""
        self._may_linger = False
        if self.lingers:
            self._transport.close()

    def _linger(self) -> None:
        self.lingers = True
        if self._transport.can_write_eof():  # not over TLS, where the length alone tells that the answer is whole
            with contextlib.suppress(OSError):  # the client has gone
                self._transport.write_eof()
        self._transport.resume_reading()  # the server pauses it when it has enough of a body
        self._loop.call_later(LINGER_S, self._transport.close)


class _Parser(HttpRequestParser):
    """Takes a request that asks for another protocol for an ordinary one, as a server may (RFC 9110, section 7.8).

    By itself it takes such a request for complete at the end of its head; its body would be the next request.
    """

    def __init__(self, protocol: HttpProtocol) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:
        """Parse what has come."""
        try:
            super().feed_data(data)
            return
        except HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        self._protocol.go_on_without_upgrade(rest)


def _answer(error: GatewayError) -> bytes:
    problem = problem_of(error)
    request_id = os.urandom(16).hex()
    body = problem.body(request_id)
    head = (
        f"content-type: {PROBLEM_JSON}\r\ncontent-length: {len(body)}\r\nx-content-type-options: nosniff\r\n"
        f"cache-control: no-store\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
    )
    return STATUS_LINE[problem.status] + head.encode() + body
