"""Where the shared Redis is, from the operator's URL."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from app.urls import is_host

_PATH = re.compile(r"/[^\x00-\x1f\x7f]{1,106}")  # what an address of a Unix socket can hold
_DATABASE = re.compile(r"/?([0-9]{1,4})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis and the database in it.

    Attributes:
        scheme: Plain TCP, TCP with TLS, or a Unix socket.
        host: Name or address; empty for a Unix socket.
        port: 1 to 65535.
        path: Of the Unix socket; empty for TCP.
        database: Number of the database.
        username: None for Redis' default user.
        password: None where the URL holds none.
    """

    scheme: Literal["redis", "rediss", "unix"]
    host: str = ""
    port: int = 6379
    path: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def parse_redis_url(url: str) -> RedisAddress:
    """Read `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]`, `rediss://` alike, or `unix://[…@]/PATH[?db=DATABASE]`.

    Raises:
        ValueError: Anything else; the message repeats nothing of it, since it may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("must be an URL: redis://host:6379/0") from None
    if parts.fragment:
        raise ValueError("must hold no fragment; a # in a password is written %23")
    username = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None
    if parts.scheme == "unix":
        path = unquote(parts.path)
        if parts.hostname or port is not None or not _PATH.fullmatch(path):
            raise ValueError("unix:// must be followed by the absolute path of a socket")
        database = _database(_only_db(parts.query))
        return RedisAddress("unix", path=path, database=database, username=username, password=password)
    if parts.scheme not in {"redis", "rediss"}:
        raise ValueError("must begin with redis://, rediss:// or unix://")
    if not is_host(parts.hostname or "") or port == 0:
        raise ValueError("must name a host and, unless it is 6379, a port")
    if parts.query:
        raise ValueError("takes no parameters; time limits and TLS have settings of their own or none")
    return RedisAddress(
        "redis" if parts.scheme == "redis" else "rediss",
        host=parts.hostname or "",
        port=port or 6379,
        database=_database(parts.path),
        username=username,
        password=password,
    )


def _only_db(query: str) -> str:
    pairs = parse_qsl(query, keep_blank_values=True)
    if [name for name, _ in pairs] not in ([], ["db"]):
        raise ValueError("unix:// takes one parameter, db")
    return pairs[0][1] if pairs else ""


def _database(text: str) -> int:
    match = _DATABASE.fullmatch(text)
    if match is None:
        raise ValueError("the database must be a number")
    return int(match[1] or 0)
