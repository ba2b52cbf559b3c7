"""Addresses of others: which services the gateway will speak to, and which proxies it will believe."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)  # names in container networks have underscores
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_MAX_NAME_CHARS = 253  # RFC 1035, section 2.3.4, without the lengths of the first and the last label

_LEAST_PREFIX = {4: 8, 6: 16}  # of networks of proxies, by version of the protocol; in bits
_MAPPED_BITS = 96  # before the IPv4 address (RFC 4291, section 2.5.5.2)


def is_host(text: str) -> bool:
    """Whether this is an address, or a name in lower case that can be none.

    What ends in a number is an address (WHATWG URL Standard, section 3.5), so that 1.2.3.999 is neither.
    """
    labels = text.split(".")
    if ":" not in text and not _NUMBER.fullmatch(labels[-1]):
        return len(text) <= _MAX_NAME_CHARS and all(_LABEL.fullmatch(label) for label in labels)
    try:
        return getattr(ipaddress.ip_address(text), "scope_id", None) is None  # no zone of one machine
    except ValueError:
        return False


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
    if not is_host(parts.hostname or "") or port == 0:
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
    if not is_host(parts.hostname or "") or port == 0:
        raise ValueError("must name a host and, unless it is the scheme's own, a port")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise ValueError("must begin with https://; http:// is for this machine alone")
    return url


def check_webhook_url(url: str) -> str:
    """Refuse an URL that can be no receiver of ours; what is sent is signed, so plain http will do inside a network.

    Raises:
        ValueError: Another scheme, a user or password, a fragment, a host at which nobody may be asked, or no possible
            host and port.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError("must be an URL") from error
    if parts.scheme not in {"http", "https"}:
        raise ValueError("must begin with http:// or https://")
    if "@" in parts.netloc or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("must hold no user, no password and no fragment")
    if not is_host(parts.hostname or "") or port == 0:
        raise ValueError("must name a host and, unless it is the scheme's own, a port")
    with suppress(AddressValueError):
        check_address(parts.hostname or "")
    return url


class AddressValueError(ValueError):
    """The text is no numeric address."""


def check_address(address: str) -> None:
    """Refuse what is no service's address: link-local ones are where clouds keep their credentials.

    Raises:
        ValueError: Link-local, multicast or unspecified; `AddressValueError` for what is no numeric address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise AddressValueError("must be a numeric address") from None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        raise ValueError("must not be link-local, multicast or unspecified")


def check_proxies(proxies: Iterable[str]) -> None:
    """Refuse addresses and networks of proxies with which anybody could say to be anybody.

    Raises:
        ValueError: One is neither address nor network, or holds too many addresses; or all together hold all of IPv4.
    """
    try:
        networks = [_network(proxy) for proxy in proxies]
    except ValueError:
        raise ValueError("must be addresses or networks, such as 10.0.0.7 or 10.0.0.0/24") from None
    if any(network.prefixlen < _LEAST_PREFIX[network.version] for network in networks) or _hold_all(networks):
        raise ValueError("must not hold so many addresses: anybody could then say to be anybody")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """An address or network; one of IPv4 addresses that are written as IPv6 is the one of IPv4."""
    network = ipaddress.ip_network(text)
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is None or network.prefixlen < _MAPPED_BITS:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))


def _hold_all(networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    return any(network.prefixlen == 0 for network in ipaddress.collapse_addresses(four))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
