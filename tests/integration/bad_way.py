"""A way to an HTTP service that can be bad: `python -m tests.integration.bad_way UPSTREAM_PORT`.

It prints the port it listens on, reads one mode per line from standard input and says each back once it holds: `pass`
forwards, `hang` never answers, `close` hangs up, `garbage` and `error` answer in the service's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

ANSWERS = {
    "garbage": (b"200 OK", b'{"predictions": {"classification_probs": [["hunter2"]]}, "processing_time_ms": -1}'),
    "error": (b"500 Hunter2", b'{"detail": "Traceback: /srv/old/model.py, key=hunter2"}'),
}


class BadWay:
    """Stands between a client and the service on `upstream_port`."""

    def __init__(self, upstream_port: int) -> None:
        self.mode = "pass"
        self._upstream_port = upstream_port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests, each in the mode of its moment."""
        # A test that ends closes this process under its connections.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                request = await read_message(reader)
                if self.mode == "hang":
                    await reader.read()
                if self.mode in {"hang", "close"}:
                    break
                if self.mode == "pass":
                    writer.write(await self._forward(request))
                else:
                    status, body = ANSWERS[self.mode]
                    writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
                await writer.drain()
        writer.transport.abort()

    async def _forward(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        try:
            writer.write(request)
            return await read_message(reader)
        finally:
            writer.transport.abort()


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """A head and the body whose length it tells."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(int(lengths[0]) if lengths else 0)


async def main(upstream_port: int) -> None:
    way = BadWay(upstream_port)
    server = await asyncio.start_server(way.serve, "127.0.0.1", 0, limit=1 << 22)
    print(server.sockets[0].getsockname()[1], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):  # until the test closes it
        way.mode = line.strip()
        print(way.mode, flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
