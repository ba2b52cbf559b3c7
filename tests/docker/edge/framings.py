"""Requests whose end two readers could see in different places: the raw material of request smuggling."""

from __future__ import annotations

from tests.docker.edge.process import HOST

# What an attacker wants to be read as a request of its own.
HIDDEN = f"GET /v2/hidden HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
CHUNKS = b"0\r\n\r\n"


def post(*lines: bytes | str, body: bytes = CHUNKS + HIDDEN, start: bytes = b"POST /v2/open HTTP/1.1") -> bytes:
    """A request of these header lines, ended as they should be."""
    encoded = [line.encode("latin-1") if isinstance(line, str) else line for line in lines]
    return b"\r\n".join([start, f"Host: {HOST}".encode(), *encoded, b"", body])


def chunked(body: bytes) -> bytes:
    return post("Transfer-Encoding: chunked", body=body + HIDDEN)


_BOTH = {
    "length and chunked": post("Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunked and length": post("Transfer-Encoding: chunked", "Content-Length: 5"),
    "length zero and chunked": post("Content-Length: 0", "Transfer-Encoding: chunked"),
    "whole length and chunked": post(f"Content-Length: {len(CHUNKS + HIDDEN)}", "Transfer-Encoding: chunked"),
    "length, chunked in capitals": post("Content-Length: 5", "TRANSFER-ENCODING: CHUNKED"),
    "length and unknown coding": post("Content-Length: 5", "Transfer-Encoding: xchunked"),
}

_CODINGS = {
    f"coding {coding!r}": post(f"Transfer-Encoding:{coding}")
    for coding in (
        " xchunked",
        " chunked, identity",
        " identity, chunked",
        " chunked, chunked",
        " gzip, chunked",
        " chunked;q=1",
        ' "chunked"',
        " chunke",
        " identity",
        " gzip",
        " ,chunked",
        " chunked,",
        " chun ked",
        " \x0bchunked",
        " chunked\x0b",
        " \x0cchunked",
        " chunked\x00",
        " \xa0chunked",
        " chunk\xe9d",
        "",
    )
}

_NAMES = {
    f"name {name!r}": post(f"{name}: chunked")
    for name in (
        "Transfer-Encoding ",
        "Transfer-Encoding\t",
        " Transfer-Encoding",
        "\tTransfer-Encoding",
        "Transfer-Encoding\x00",
        "Transfer-Encoding\x0b",
        "Transfer\x00-Encoding",
        "Transfer Encoding",
        "\x01Transfer-Encoding",
        "Transfer-Encoding\x7f",
    )
} | {
    "length with a space before the colon": post("Content-Length : 5"),
    "no colon": post("Transfer-Encoding chunked"),
    "no name": post(": chunked"),
}

_LENGTHS = {
    f"length {length!r}": post(f"Content-Length:{length}")
    for length in (
        " +5",
        " -1",
        " -0",
        " 0x5",
        " 5e0",
        " 5.0",
        " 5 5",
        " 5, 5",
        " 5,6",
        " 5;",
        " five",
        " 9223372036854775808",
        " 18446744073709551621",
        " " + "9" * 40,
        " 5\x00",
        " 5\x0b",
        " \xb2",
        "",
    )
} | {
    "length twice, the same": post("Content-Length: 5", "Content-Length: 5"),
    "length twice, another": post("Content-Length: 5", f"Content-Length: {len(CHUNKS + HIDDEN)}"),
    "length twice, in another case": post("Content-Length: 5", "content-length: 6"),
    "coding twice": post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "coding twice, another": post("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
}

_FOLDS = {
    "folded coding": post("Transfer-Encoding:", " chunked"),
    "folded with a tab": post("X: y", "\tTransfer-Encoding: chunked"),
    "folded length": post("Content-Length: 5", " 0"),
    "fold before the first header": b"POST /v2/open HTTP/1.1\r\n Host: " + HOST.encode() + b"\r\n\r\n" + HIDDEN,
    "bare CR in a value": post("X: y\rTransfer-Encoding: chunked"),
    "bare CR before a name": post("\rTransfer-Encoding: chunked"),
}

_CHUNKS = {
    f"chunk {body!r}": chunked(body)
    for body in (
        b"g\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n0\r\n\r\n",
        b"0x1\r\na\r\n0\r\n\r\n",
        b" 1\r\na\r\n0\r\n\r\n",
        b"\r\n",
        b"1_0\r\n",
        b"ffffffffffffffff\r\n",
        b"10000000000000000\r\n",
        b"1\r\nabc\r\n0\r\n\r\n",
        b"1\r\na0\r\n\r\n",
        b"1\rX\r\na\r\n0\r\n\r\n",
    )
}

_VERSIONS = {
    "chunked in HTTP/1.0": post("Transfer-Encoding: chunked", start=b"POST /v2/open HTTP/1.0"),
    "length and chunked in HTTP/1.0": post(
        "Content-Length: 5", "Transfer-Encoding: chunked", start=b"POST /v2/open HTTP/1.0"
    ),
    "no such version": post(start=b"POST /v2/open HTTP/3.0"),
    "a version of letters": post(start=b"POST /v2/open HTTP/one"),
    "two versions": post(start=b"POST /v2/open HTTP/1.1 HTTP/1.1"),
    "another protocol": post(start=b"POST /v2/open SPDY/1.1"),
    "method in small letters": post(start=b"post /v2/open HTTP/1.1"),
    "no target": post(start=b"POST HTTP/1.1"),
    "a target without a slash": post(start=b"POST v2/open HTTP/1.1"),
    "NUL in the target": post(start=b"POST /v2/op\x00en HTTP/1.1"),
    "escaped NUL in the target": post(start=b"POST /v2/op%00en HTTP/1.1"),
    "escaped line end in the target": post(start=b"POST /v2/open%0d%0aX:%20y HTTP/1.1"),
    "a tab in the request line": post(start=b"POST\t/v2/open HTTP/1.1"),
}

_HOSTS = {
    "no host": b"GET /v2/open HTTP/1.1\r\n\r\n" + HIDDEN,
    "two hosts": post(f"Host: {HOST}"),
    "two hosts, another": post("Host: other.test"),
    "host with a path": f"GET /v2/open HTTP/1.1\r\nHost: {HOST}/health\r\n\r\n".encode() + HIDDEN,
    "host with a space": f"GET /v2/open HTTP/1.1\r\nHost: {HOST} other\r\n\r\n".encode() + HIDDEN,
    "host with NUL": f"GET /v2/open HTTP/1.1\r\nHost: {HOST}\x00\r\n\r\n".encode() + HIDDEN,
    "empty host": b"GET /v2/open HTTP/1.1\r\nHost:\r\n\r\n" + HIDDEN,
}

MUTATIONS: dict[str, bytes] = _BOTH | _CODINGS | _NAMES | _LENGTHS | _FOLDS | _CHUNKS | _VERSIONS | _HOSTS
