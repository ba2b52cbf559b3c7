"""What is asked of every request's head, whatever its route, and said to browsers in every answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from starlette.types import Scope

from app.errors import BadRequest, GatewayError, HeadTooLarge, NotFound

MAX_HEADERS = 100

Headers = Sequence[tuple[bytes, bytes]]

# Names that proxies and frameworks have taken for those with hyphens, so that one looked at what another did not.
_TWINS = frozenset(
    name.replace(b"-", b"_")
    for name in (
        *(b"content-length", b"transfer-encoding", b"content-type", b"content-encoding"),
        *(b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"),
        *(b"inference-header-content-length", b"x-request-id", b"x-request-timeout-ms", b"x-route-key", b"x-route-to"),
        b"x-symbol",
    )
)

_CLOSE = {"Connection": "close"}
_COMMON = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
_ONLY_TLS = (b"strict-transport-security", b"max-age=31536000")

# What a page of an allowed origin may send and see beside what the Fetch standard lets every page (section 3.2).
_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST, PUT"),
    (
        b"access-control-allow-headers",
        b"Authorization, Content-Type, Content-Encoding, Inference-Header-Content-Length, X-Request-Id, "
        b"X-Request-Timeout-Ms, X-Route-Key, X-Route-To, X-Symbol",
    ),
    (b"access-control-max-age", b"600"),
)
_EXPOSED = (
    b"access-control-expose-headers",
    b"Inference-Header-Content-Length, RateLimit, RateLimit-Policy, Retry-After, Server-Timing, X-Fallback, "
    b"X-Request-Id, X-Served-By",
)


class Front:
    """The gateway's face towards clients that may be hostile and browsers that may be misused.

    Cookies are never used and never allowed across origins: who asks is told by the token alone.

    Args:
        hosts: Names by which the gateway is called, lower case, without port; none: any name.
        origins: Origins (`https://desk.example`) whose pages may call; no others may.
        behind_tls: Whether clients come by TLS, which ends before us.
    """

    def __init__(self, *, hosts: Iterable[str] = (), origins: Iterable[str] = (), behind_tls: bool = False) -> None:
        self._hosts = frozenset(host.encode() for host in hosts)
        self._origins = frozenset(origin.encode() for origin in origins)
        self._headers = (*_COMMON, _ONLY_TLS) if behind_tls else _COMMON

    def fault_in(self, scope: Scope) -> GatewayError | None:
        """Why the request is refused before its route is looked for; None for a good one."""
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS:
            return HeadTooLarge()
        hosts = [value for name, value in headers if name == b"host"]
        fault: GatewayError | None = None
        if len(hosts) != 1 or scope["http_version"] != "1.1":
            fault = _framing_fault(scope, len(hosts))
        names = [name for name, _ in headers]
        if fault is None and b"transfer-encoding" in names:
            fault = _coding_fault(headers)
        if fault is None and not _TWINS.isdisjoint(names):
            fault = BadRequest("a header's name has _ where it must have -", headers=_CLOSE)
        if fault is None and self._hosts:
            fault = self._host_fault(hosts)
        path = scope["path"]
        if fault is None and not (path.isascii() and path.isprintable()):
            fault = NotFound("no such route")  # to the router's patterns, a line's end at the end is nothing
        return fault

    def headers_for(self, scope: Scope) -> Headers:
        """What every answer to this request says beside its own headers."""
        if not self._origins:
            return self._headers
        origin = _origin(scope)
        if origin not in self._origins:
            return (*self._headers, (b"vary", b"Origin"))
        return (*self._headers, (b"vary", b"Origin"), (b"access-control-allow-origin", origin), _EXPOSED)

    def preflight(self, scope: Scope) -> Headers | None:
        """The answer to a browser that asks whether a page may call; None for any other request, and for no."""
        if scope["method"] != "OPTIONS" or _origin(scope) not in self._origins:
            return None
        asks = any(name == b"access-control-request-method" for name, _ in scope["headers"])
        return _PREFLIGHT if asks else None

    def _host_fault(self, hosts: list[bytes]) -> GatewayError | None:
        if hosts and _name(hosts[0]) in self._hosts:
            return None
        return BadRequest("this gateway is not called by that name", headers=_CLOSE)


def _framing_fault(scope: Scope, n_hosts: int) -> GatewayError | None:
    """What proxies and servers have read in different ways (RFC 9112, sections 3.2 and 6.1)."""
    version = scope["http_version"]
    if version not in {"1.0", "1.1"}:
        return BadRequest("this gateway speaks HTTP/1.1", headers=_CLOSE)
    if n_hosts > 1 or (n_hosts == 0 and version == "1.1"):
        return BadRequest("there must be one Host header", headers=_CLOSE)
    if version == "1.0" and any(name == b"transfer-encoding" for name, _ in scope["headers"]):
        return BadRequest("HTTP/1.0 has no Transfer-Encoding", headers=_CLOSE)
    return None


def _coding_fault(headers: Headers) -> GatewayError | None:
    """The parser takes any coding before the chunks and leaves it on the body; whoever decodes it sees another one."""
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings == [b"chunked"]:
        return None
    return BadRequest("Transfer-Encoding must be chunked alone", headers=_CLOSE)


def has_its_host(target: bytes, headers: Headers) -> bool:
    """Whether a request target names its host, if it does at all, as the Host header does (RFC 9112, section 3.2).

    Args:
        target: As it stands in the request line; `http://a:80/path` names a host, `/path` none.
        headers: Of the request, names in lower case.
    """
    if target.startswith(b"/"):
        return True
    scheme, _, rest = target.partition(b"://")
    authority = re.split(rb"[/?#]", rest, maxsplit=1)[0].lower()
    hosts = [value.lower() for name, value in headers if name == b"host"]
    return scheme.lower() in {b"http", b"https"} and authority != b"" and hosts == [authority]


def _name(host: bytes) -> bytes:
    """The name in a Host header, without its port and in lower case."""
    name, _, port = host.rpartition(b":")
    return (name if port.isdigit() else host).lower()


def _origin(scope: Scope) -> bytes:
    """The page's origin; none of a request that names several."""
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    return origins[0] if len(origins) == 1 else b""
