"""One connection to the shared Redis, over which bundles of commands go one after the other; the home of redis-py.

The library's client is left out and its connection used bare: a client would take a connection from a pool, and wait
for an answer, once per command; here everything that is asked at one time costs one write and one read.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.exceptions import NoScriptError, ResponseError

from app.shared.address import RedisAddress
from app.shared.commands import BadKey, Command, RedisAway

# A peer that is gone without a word is given up by the kernel after so long; our own deadlines come first.
_TCP_OPTIONS = {
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 10_000,
}


class RedisLink:
    """Asks Redis; connects when it is asked first, and anew after any failure. One bundle at a time is under way.

    Args:
        address: Where it is.
        password: Gives the password, each time one is needed; None for that of the address, if any.
        ca_file: Certificates to trust with TLS; None for the public ones.
    """

    def __init__(
        self, address: RedisAddress, *, password: Callable[[], bytes] | None = None, ca_file: str | None = None
    ) -> None:
        self._connection = _connection(address, password, ca_file)
        self._turn = asyncio.Lock()

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """The answers to a bundle, in its order; a command that Redis refused has its `RedisAway` there.

        A script that Redis has forgotten is sent again, once and within the time.

        Args:
            commands: One or more.
            timeout_s: Seconds for all of it, connecting included.

        Raises:
            RedisAway: There are no answers to be had in the time.
        """
        try:
            async with _at_most(timeout_s), self._turn:
                return await self._ask_with_scripts(commands)
        except Exception as error:  # a file without a password, a peer that speaks no Redis: all the same to callers
            raise RedisAway(type(error).__name__) from None

    async def close(self) -> None:
        """Close the connection; a later bundle opens one again."""
        await self._connection.disconnect(nowait=True)

    async def _ask_with_scripts(self, commands: Sequence[Command]) -> list[Any]:
        answers = await self._exchange(commands)
        forgotten = [place for place, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if forgotten:
            again = await self._exchange([commands[place].in_full() for place in forgotten])
            for place, answer in zip(forgotten, again, strict=True):
                answers[place] = answer
        return [_translated(answer) for answer in answers]

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        connection = self._connection
        try:
            if not connection.is_connected:
                await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_packed_command(connection.pack_commands([command.words for command in commands]))
            return [await self._read() for _ in commands]
        except BaseException:  # answers still under way would be taken for those of the next bundle
            await connection.disconnect(nowait=True)
            raise

    async def _read(self) -> Any:
        try:
            return await self._connection.read_response()
        except ResponseError as error:
            return error


@asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    """End the block with `TimeoutError` after so long, but not before the loop has read what came meanwhile.

    After a pause of the whole process the timer may be looked at before the socket, on which the answer waits.
    """
    grace_s = seconds / 10
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(seconds - grace_s, lambda: limit.reschedule(loop.time() + grace_s))
        try:
            yield
        finally:
            timer.cancel()


def _translated(answer: Any) -> Any:
    if not isinstance(answer, ResponseError):
        return answer
    text = str(answer)
    if "WRONGTYPE" in text or "not an integer" in text:
        return BadKey("a key holds something else")
    return RedisAway(type(answer).__name__)


def _connection(
    address: RedisAddress, password: Callable[[], bytes] | None, ca_file: str | None
) -> Connection | UnixDomainSocketConnection:
    options: dict[str, Any] = {
        "db": address.database,
        "socket_timeout": None,  # a bundle's deadline covers connecting, sending and reading
        "socket_connect_timeout": None,
        "protocol": 2,
        "driver_info": None,
    }
    if password is None:
        options.update(username=address.username, password=address.password)
    else:
        options.update(credential_provider=_Credentials(address.username, password))
    if address.scheme == "unix":
        return UnixDomainSocketConnection(path=address.path, **options)
    options.update(host=address.host, port=address.port, socket_keepalive_options=_TCP_OPTIONS)
    if address.scheme == "redis":
        return Connection(**options)
    return SSLConnection(ssl_ca_certs=ca_file, **options)


class _Credentials(CredentialProvider):
    """Looks the password up when a connection is made, so that it can be changed under a running gateway."""

    def __init__(self, username: str | None, look_up: Callable[[], bytes]) -> None:
        self._username = username
        self._look_up = look_up

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._look_up().decode()
        return (password,) if self._username is None else (self._username, password)
