"""A service to which a webhook tells its events."""

from __future__ import annotations

import asyncio


class Receiver:
    """A real HTTP server on loopback that answers with one status after the other, or not at all."""

    def __init__(self, *statuses: int) -> None:
        self._statuses = list(statuses)
        self.requests: list[tuple[dict[str, str], bytes]] = []

    async def __aenter__(self) -> Receiver:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
        self.requests.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        if status:
            writer.write(b"HTTP/1.1 %d X\r\nLocation: /else\r\nContent-Length: 0\r\n\r\n" % status)
            await writer.drain()
        else:
            await reader.read()  # until nobody waits any more
        writer.close()
