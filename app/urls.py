"""Addresses of other services: which ones the gateway will speak to."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|[0-9a-f:.]*:[0-9a-f:.]*")  # a name, IPv4 or IPv6


def check_origin(url: str) -> str:
    """Refuse what is more, or less, than the scheme, host and port of an HTTP service.

    Raises:
        ValueError: Another scheme, no host, a user or password, a path, query or fragment, or no possible port.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError("must be an URL: scheme, host and port") from error
    if parts.scheme not in {"http", "https"}:
        raise ValueError("must begin with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("must hold no user and no password; a token has its own file")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError("must end with the port; the path has its own setting")
    if not HOST.fullmatch(parts.hostname or "") or port == 0:
        raise ValueError("must name a host and, unless it is the scheme's own, a port")
    return url.rstrip("/")


def check_key_url(url: str) -> str:
    """Refuse an URL from which no keys should be believed.

    Raises:
        ValueError: Plain http to another machine, where anybody on the way could put in a key, a user or password, a
            fragment, or no possible host and port.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError("must be an URL") from error
    if "@" in parts.netloc or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("must hold no user, no password and no fragment")
    if not HOST.fullmatch(parts.hostname or "") or port == 0:
        raise ValueError("must name a host and, unless it is the scheme's own, a port")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise ValueError("must begin with https://; http:// is for this machine alone")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
