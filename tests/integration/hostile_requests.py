"""Requests that nobody means well, made by code and the same in every run.

Each is raw bytes, so that no client library tidies it up, with what may come back: a refusal, or, where something odd
is to be passed over and not refused, anything but a fault of ours.
"""

# ruff: noqa: E501  # tables
from __future__ import annotations

import gzip
import json
import math
import random
import struct
import zlib
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

MARK = "qx~mark"

NATIVE, OPEN, SHARE = "/ray-serve/predict", "/v2/models/cnn_lstm/infer", "/rollout"
JSON, BYTES = "application/json", "application/octet-stream"


class Hostile(NamedTuple):
    """A request, and whether it must be refused or only survived."""

    head: bytes
    body: bytes
    must_be_refused: bool = True

    @property
    def raw(self) -> bytes:
        return self.head + self.body


def corpus(bearer: str, seed: int = 20261123) -> Iterator[Hostile]:
    """Every request, for a caller who may do anything."""
    chance = random.Random(seed)
    writer = _Writer(bearer)
    yield from _texts(writer)
    yield from _numbers(writer, chance)
    yield from _poisoned_bytes(writer, chance)
    yield from _garbage(writer, chance)
    yield from _damaged(writer, chance)
    yield from _names(writer)
    yield from _headers(writer)
    yield from _bombs(writer)


class _Writer:
    def __init__(self, bearer: str) -> None:
        self._bearer = bearer

    def __call__(
        self,
        path: str,
        body: bytes = b"",
        kind: str = JSON,
        *headers: str,
        method: str = "POST",
        must_be_refused: bool = True,
    ) -> Hostile:
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: gateway",
            f"Authorization: {self._bearer}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            *headers,
        ]
        return Hostile(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), body, must_be_refused)


# --- JSON


NO_JSON = [
    *("", " ", "\x00", "{", "}", "[", "]", "[[", "{]", "[}", "nul", "tru", "True", "None", "undefined", "NaN", "-NaN"),
    *("Infinity", "-Infinity", "1e999", "-1e999", "01", "+1", ".5", "5.", "1e", "1e+", "0x1f", "1_000", "--1", "- 1", "\u0661"),
    *("'a'", '"a', 'a"', '"\\x41"', '"\\u12"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud800\\u0041"', '"\t"', '"\n"', '"\x1f"'),
    *("[1,]", "[,1]", "[1 2]", "[1,,2]", '{"a"}', '{"a":}', '{:1}', '{"a":1,}', '{"a" 1}', "{a:1}", "{1:1}", '{"a":1}}'),
    *("// c\n1", "/* c */ 1", "# c\n1", "1 // c", "[1]x", "1 1", "<a/>", "a=1&b=2", "\ufeff{}", "\ufeff", "[" * 2000, '{"a":' * 2000),
]  # fmt: skip
NO_UTF8 = [b"\xff", b'"\xff"', b'{"\xff":1}', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"']
OTHER_ENCODINGS = ['{"data":[]}'.encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")]
NO_WINDOWS = [
    *("null", "true", "false", "0", "-0", "1", "1.5", "1e5", "1e300", '""', '"a"', '"1"', "[]", "[[]]", "[[[]]]", "{}"),
    *("[null]", "[true]", '["1"]', "[[1]]", "[[[1]]]", "[[[[1]]]]", "[1,[2]]", "[[1],[2,3]]", "[[[1],[2,3]]]", "[{}]"),
    *('[{"a":1}]', "[[{}]]", '{"a":{"a":{"a":1}}}', "[[[[[[[[[[1]]]]]]]]]]", "[[1],[],[1]]", '[["a"]]', "[[true]]"),
    *(f'"{MARK}"', f'{{"{MARK}":1}}', f'["{MARK}"]', '"\\u0000"', '"\\u2028"', '"=cmd()"', "[" * 7 + "]" * 7),
    *("123456789012345678901234567890", "-123456789012345678901234567890", "9" * 400, "1" + "0" * 308, "5e-324", "[[],[]]"),
]  # fmt: skip


def _texts(write: _Writer) -> Iterator[Hostile]:
    bodies = [*(text.encode() for text in NO_JSON), *NO_UTF8]
    for body in (*bodies, *OTHER_ENCODINGS):
        yield write(NATIVE, body)
        yield write(OPEN, body)
        yield write(OPEN, body + b"\0" * 12_000, BYTES, f"Inference-Header-Content-Length: {len(body) or 1}")
        yield write(SHARE, body, method="PUT")
    for body in (*bodies, *(text.encode() for text in NO_WINDOWS)):
        yield write(NATIVE, b'{"data":' + body + b"}")
        yield write(NATIVE, b'{"data":[[' + body + b"]]}")
        yield write(OPEN, b'{"inputs":' + body + b"}")
        yield write(OPEN, _tensor(b'"shape":[1,50,60],"data":' + body))
        yield write(OPEN, _tensor(b'"data":[0],"shape":' + body))
        yield write(OPEN, b'{"inputs":[' + body + b"]}")
    for body in (*bodies, b"null", b"-1e-9", b"1.01", b'"0.5"', b"true", b"[]", b"{}", b"1e300", b"9" * 400):
        yield write(SHARE, b'{"ray_serve_fraction":' + body + b"}", method="PUT")
    for body, flag in product(
        (b"null", b"0", b"1", b'"true"', b"[]", b"{}", b"NaN"),
        ("return_uncertainty", "use_ensemble", "return_features"),
    ):
        yield write(NATIVE, b'{"data":' + _window_text() + f',"{flag}":'.encode() + body + b"}")
        yield write(f"{NATIVE}?{flag}={body.decode()}", bytes(12_000), BYTES)


def _tensor(members: bytes) -> bytes:
    return b'{"inputs":[{"name":"windows","datatype":"FP32",' + members + b"}]}"


def _window_text(at: int = -1, literal: bytes = b"") -> bytes:
    """A window as nested lists, with one number replaced."""
    values = [b"0.5"] * 3000
    if at >= 0:
        values[at] = literal
    return b"[" + b",".join(b"[" + b",".join(values[i : i + 60]) + b"]" for i in range(0, 3000, 60)) + b"]"


WRONG_NUMBERS = [
    *("NaN", "nan", "Infinity", "-Infinity", "inf", "1e999", "-1e999", "1e5000", "1e300", "-1e300", "1e39", "3.5e38"),
    *("1000001", "-1000001", "1e7", "9007199254740993e9", "18446744073709551616", "123456789012345678901234567890"),
    *("true", "false", "null", '"1"', '"NaN"', "[]", "[1]", "{}", '{"a":1}', "01", "+1", ".5", "1.", "1e", "0x1", "1_0"),
    *("--1", "1,1", "", " ", "\u0661", "\\u0031", "'1'", "1;", "1]", "]", "9" * 400, f'"{MARK}"', MARK, "1 1", "-", "e1"),
]  # fmt: skip


def _numbers(write: _Writer, chance: random.Random) -> Iterator[Hostile]:
    for literal in WRONG_NUMBERS:
        for _ in range(14):
            window = _window_text(chance.randrange(3000), literal.encode())
            yield write(NATIVE, b'{"data":' + window + b"}")
            yield write(NATIVE, b'{"data":[' + window + b"]}")
            yield write(OPEN, _tensor(b'"shape":[1,50,60],"data":[' + window + b"]"))
            flat = b"[" + window.translate(None, b"[]") + b"]"
            if not {"[]", "[1]", "1]", "]", ""} & {literal}:
                yield write(OPEN, _tensor(b'"shape":[1,50,60],"data":' + flat))


# --- bytes


def _poisoned_bytes(write: _Writer, chance: random.Random) -> Iterator[Hostile]:
    for value, _ in product((math.nan, math.inf, -math.inf, 1.1e6, -3e38), range(40)):
        body = bytearray(12_000)
        struct.pack_into("<f", body, 4 * chance.randrange(3000), value)
        yield write(NATIVE, bytes(body), BYTES)
        yield write(OPEN, bytes(body), BYTES, "Inference-Header-Content-Length: 0")
        head = _tensor(b'"shape":[1,50,60],"parameters":{"binary_data_size":12000}')
        yield write(OPEN, head + bytes(body), BYTES, f"Inference-Header-Content-Length: {len(head)}")


def _garbage(write: _Writer, chance: random.Random) -> Iterator[Hostile]:
    for _ in range(250):
        body = chance.randbytes(chance.randrange(1, 3000))
        yield write(NATIVE, body)
        yield write(NATIVE, body, BYTES)
        yield write(OPEN, body)
        yield write(OPEN, body, JSON, "Content-Encoding: gzip")
        yield write(SHARE, body, method="PUT")


def _damaged(write: _Writer, chance: random.Random) -> Iterator[Hostile]:
    """Good bodies with a few bytes changed: some are still good."""
    native = b'{"data":' + _window_text() + b',"return_features":true}'
    head = _tensor(b'"shape":[1,50,60],"parameters":{"binary_data_size":12000}')
    for _ in range(250):
        yield write(NATIVE, _damage(native, chance), must_be_refused=False)
        damaged = _damage(head, chance)
        length = f"Inference-Header-Content-Length: {len(damaged)}"
        yield write(OPEN, damaged + bytes(12_000), BYTES, length, must_be_refused=False)
        packed = _damage(gzip.compress(native, mtime=0), chance)
        yield write(OPEN, packed, JSON, "Content-Encoding: gzip", must_be_refused=False)


def _damage(body: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(body)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(damaged))
        damaged[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return bytes(damaged)


# --- names


NAMES = [
    *("..", ".", "...", "%2e%2e", "%2e%2e%2f", "..%2f..%2fetc%2fpasswd", "%252e%252e", "..%5c..", "%00", "a%00", "cnn_lstm%00"),
    *("cnn_lstm%20", "%20cnn_lstm", "cnn_lstm%0a", "cnn_lstm%0d%0aX:1", "cnn_lstm/", "CNN_LSTM", "cnn-lstm", "cnn_lstm;1", "*"),
    *("%ff", "%c0%ae%c0%ae", "%e2%80%a4%e2%80%a4", "%ef%bc%8e%ef%bc%8e", "cnn%5flstm%2f1", "~root", "$HOME", "%24%7b7*7%7d"),
    *("{{7*7}}", "%3cscript%3e", "'%20or%201=1", "latest%2f..%2fx", "etc%2fpasswd", "con", "nul", "-1", "1e3", "0x1", "a" * 300),
    *(MARK, f"{MARK}%0a", "%F0%9F%92%A9", "%u002e", "%", "%zz", "a%2", "cnn_lstm%2finfer", "..;", "__proto__", "constructor"),
]  # fmt: skip


def _names(write: _Writer) -> Iterator[Hostile]:
    good = bytes(12_000)
    for name in NAMES:
        length = "Inference-Header-Content-Length: 0"
        yield write(f"/v2/models/{name}/infer", good, BYTES, length)
        yield write(f"/v2/models/cnn_lstm/versions/{name}/infer", good, BYTES, length)
        for path in (
            *(
                f"/v2/models/{name}",
                f"/v2/models/{name}/ready",
                f"/v2/models/{name}/stats",
                f"/{name}",
                f"/docs/{name}",
            ),
            *(f"/v2/models/cnn_lstm/versions/{name}", f"/v2/models/cnn_lstm/versions/{name}/ready", f"/rollout/{name}"),
        ):
            yield write(path, method="GET", must_be_refused=name not in {".", "..", "*", "cnn_lstm/"})


# --- headers


VALUES = [
    *(
        "",
        " ",
        "0",
        "-1",
        "1e3",
        "99999999999999999999",
        "NaN",
        "1.5",
        "0x10",
        "1,1",
        "x" * 5000,
        "\xff\xfe",
        "a\tb",
        MARK,
    ),
    *(
        "' or 1=1",
        "${jndi:ldap://x}",
        "../../etc/passwd",
        "<script>",
        "%0d%0aX: 1",
        "null",
        "[]",
        "{}",
        "*",
        ";",
        '"',
        "\\",
    ),
]
REFUSED_FOR_THEIR_VALUE = [
    "X-Request-Timeout-Ms",
    "X-Route-To",
    "X-Route-Key",
    "Content-Encoding",
]
PASSED_OVER = [
    *(
        "X-Request-Id",
        "Traceparent",
        "Tracestate",
        "Accept",
        "Accept-Encoding",
        "Cookie",
        "Origin",
        "Referer",
        "User-Agent",
    ),
    *("X-Forwarded-For", "X-Forwarded-Host", "X-Original-Url", "X-Rewrite-Url", "X-HTTP-Method-Override", "Forwarded"),
    *("X_Forwarded_For", "X_Request_Timeout_Ms", "X-Real-Ip", "Range", "If-None-Match", "Priority", "Via", "Baggage"),
]


def _headers(write: _Writer) -> Iterator[Hostile]:
    good = bytes(12_000)
    for name, value in product(REFUSED_FOR_THEIR_VALUE, VALUES):
        for path, length in ((NATIVE, ()), (OPEN, ("Inference-Header-Content-Length: 0",))):
            is_none = name == "Content-Encoding" and not value.strip()
            yield write(path, good, BYTES, *length, f"{name}: {value}", must_be_refused=not is_none)
    for value in VALUES:
        yield write(OPEN, good, BYTES, f"Inference-Header-Content-Length: {value}", must_be_refused=value != "0")
        yield write(NATIVE, good, value, must_be_refused=True)
    for name, value in product(PASSED_OVER, VALUES):
        yield write(NATIVE, good, BYTES, f"{name}: {value}", must_be_refused=False)
    for name in ("Content-Type", "X-Request-Timeout-Ms", "X-Route-To", "Host", "Authorization"):
        yield write(NATIVE, good, BYTES, f"{name}: {BYTES}", f"{name}: 1")
    yield write(NATIVE, good, BYTES, *(f"X-{i}: a" for i in range(200)))


def _bombs(write: _Writer) -> Iterator[Hostile]:
    zeros = bytes(64 << 20)
    for coding, bomb in (("gzip", gzip.compress(zeros)), ("deflate", zlib.compress(zeros))):
        for _ in range(10):
            yield write(OPEN, bomb, JSON, f"Content-Encoding: {coding}")
            yield write(NATIVE, bomb, JSON, f"Content-Encoding: {coding}")
    for filling in ("[]", "{}", "[[]]", '""', "1", "1.5", "null", '{"a":1}'):
        many = ("[" + ",".join([filling] * (900_000 // (len(filling) + 1))) + "]").encode()
        yield write(NATIVE, b'{"data":' + many + b"}")
        yield write(NATIVE, b'{"data":[' + many + b"]}")
        yield write(OPEN, b'{"a":' + many + b"," + _tensor(b'"data":[0],"shape":[1,50,60]')[1:])
        yield write(OPEN, _tensor(b'"shape":[1,50,60],"data":' + many))
    wrong = json.dumps([["a"] * 60] * 50 * 60).encode()[: 1 << 20]
    yield write(NATIVE, b'{"data":' + wrong)
    for body in (b"\\" * 900_000, b'\\"' * 450_000, b"\\\\" * 450_000):
        yield write(OPEN, b'{"a":"' + body + b'","inputs":[]}')
        yield write(NATIVE, b'{"a":"' + body + b'"}')
