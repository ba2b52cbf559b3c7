"""Forged and malformed credentials, made from the keys of one gateway: none of them may open it.

Whoever forges here knows all that is public and, for faults in header and claims, even the signing key: a token can
be signed rightly and still not count.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from cryptography.hazmat.primitives import serialization

from tests.app.auth.signing import CLAIMS, NOW, PrivateKey, claims_with, decode, encode, public_jwk, signing_input

Sign = Callable[[Any, Any], str]  # header and claims, or their bytes, to a token with a right signature

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_FAR = 31_536_000

KIDS: list[Any] = [
    "../../dev/null",
    "/dev/null",
    "/proc/self/environ",
    "file:///etc/passwd",
    "http://127.0.0.1:9/key",
    "x' UNION SELECT '1",
    "x'; DROP TABLE keys; --",
    "|sleep 10",
    "$(sleep 10)",
    "`sleep 10`",
    "%00",
    "k1\0",
    "k1 ",
    " k1",
    "K1",
    "k1\n",
    "k1/../k1",
    "",
    "k" * 65,
    "k" * 10_000,
    "é",
    "ｋ1",
    "\u202ek1",
    1,
    1.0,
    True,
    None,
    [],
    ["k1"],
    {},
    {"k1": 1},
    "__proto__",
    "none",
    "unknown",
]
HEADERS: list[dict[str, Any]] = [
    {"jku": "http://127.0.0.1:9/keys"},
    {"jku": "https://issuer.example/.well-known/jwks.json"},
    {"x5u": "http://127.0.0.1:9/cert"},
    {"jwk": {"kty": "oct", "k": "AAAA"}},
    {"jwk": {"kty": "RSA", "n": "AQAB", "e": "AQAB"}},
    {"x5c": ["MIIB"]},
    {"x5t": "AAAA"},
    {"x5t#S256": "AAAA"},
    {"crit": ["exp"]},
    {"crit": ["b64"], "b64": False},
    {"crit": []},
    {"b64": False},
    {"b64": True},
    {"zip": "DEF"},
    {"enc": "A256GCM"},
    {"epk": {}},
    {"p2c": 2_147_483_647},
    {"url": "http://127.0.0.1:9"},
    {"nonce": "x"},
    {"iss": "sluice"},
    {"exp": NOW + 600},
    {"typ": "JWE"},
    {"typ": "jwt "},
    {"typ": "dpop+jwt"},
    {"typ": "logout+jwt"},
    {"typ": "secevent+jwt"},
    {"typ": ""},
    {"typ": 1},
    {"typ": None},
    {"typ": ["JWT"]},
    {"cty": {"a": 1}},
    {"cty": None},
    {"ALG": "none"},
    {"Kid": "k1"},
    {"": ""},
    {"\0": ""},
    {"\ud800": ""},
]
ALGORITHMS: list[Any] = [
    *("none", "None", "NONE", "nOnE", "", " ", "none\0", "hs256", "Hs256", "HS256 ", "HS384", "HS512", "RS384"),
    *("RS512", "PS256", "PS384", "PS512", "ES384", "ES512", "ES256K", "EdDSA", "Ed25519", "dir", "RSA1_5", "RSA-OAEP"),
    *("A128KW", "PBES2-HS256+A128KW", "HS256,RS256", None, True, False, 0, 256, [], ["HS256"], {}, {"alg": "HS256"}),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 1e308, "", " ", "\0", "a\nb", "a\u2028b", "\x1b[31m", "\ud800", "x" * 256),
    *([], [[]], ["sluice"], [None], {}, {"sluice": 1}, 10**20, 10**400, -(10**20), "null", "true", str(NOW + 600)),
]
TIMES: list[dict[str, Any]] = [
    *({"exp": NOW - 30}, {"exp": NOW - 3600, "iat": NOW - 7200}, {"exp": 0, "iat": 0}, {"exp": NOW + 86_401}),
    *({"exp": NOW + 10 * _FAR}, {"exp": NOW, "iat": NOW}, {"exp": NOW + 600.0}, {"exp": NOW + 0.5}),
    *({"iat": NOW + 31}, {"iat": NOW + _FAR, "exp": NOW + _FAR + 100}, {"iat": NOW - 10 * _FAR}, {"iat": NOW + 0.0}),
    *({"nbf": NOW + 31}, {"nbf": NOW + _FAR}, {"nbf": "0"}, {"nbf": -1}, {"exp": 1 << 53}, {"exp": 1 << 63}),
    *({"exp": (1 << 64) + NOW}, {"iat": NOW - 86_400, "exp": NOW + 600}, {"exp": "1e10"}, {"exp": [NOW + 600]}),
]
TEXTS: list[dict[str, Any]] = [
    *({"iss": text} for text in ("Sluice", "sluice ", " sluice", "sluice\0", "sluice/", "evil", "SLUICE", "ｓluice")),
    *({"aud": text} for text in ("other", "sluice2", "sluice,other", "sluice ", ["sluice"], ["other", "sluice"], "*")),
    *({"scope": text} for text in ("predict  ops", " predict", "predict ", "predict\tops", "predict\nops", "Predict")),
    *({"scope": text} for text in ("*", "predict,ops", ["predict"], "é", "a" * 65, "a " * 600, "predict\0", "-")),
    *({"models": value} for value in (None, "cnn_lstm", {}, [1], ["../x"], ["X"], [""], ["a"] * 65, [["a"]])),
    *({"tenant": value} for value in ("", "a\nb", 1, True, [], {}, "x" * 256, "\x00", "\ud800")),
    *({"jti": value} for value in ("", "a\nb", 1, None, [], {}, "x" * 256)),
]
RAW_HEADERS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"{",
    b'"HS256"',
    b"1",
    b"\xff\xfe",
    b"\xef\xbb\xbf%b",
    b"%b\0",
    b"%b%b",
    b"%b,",
    b"'alg':'HS256'",
    b'{"alg":"none",%b',
    b'{"typ":"JWT"}',
    b'{"alg":' + b"[" * 120 + b"]" * 120 + b"}",
    b'{"kid":' + b"[" * 1200 + b"]" * 1200 + b"}",
    b'{"alg":' + b"9" * 300 + b"}",
    b'{"alg":NaN}',
    b'{"alg":1e999}',
    b"\x00" * 40,
    b'{"alg": "\\u0000"}',
    b'{"alg": "\\ud800"}',
    b'{"al\\u0067":"none"}',
]


def forgeries(
    *, private: PrivateKey | None, secret: bytes, header: dict[str, Any], sign: Sign, seed: int = 0
) -> Iterator[str]:
    """Every forgery against one gateway.

    Args:
        private: Its issuer's key pair; None where tokens are signed by the secret.
        secret: The secret, or some secret that the gateway does not know.
        header: Of a token that counts.
        sign: Makes tokens that count, given such a header and good claims.
        seed: Of what is changed at random.
    """
    good = sign(header, CLAIMS)
    yield from _unsigned(header, good)
    if private is not None:
        yield from _confused(header, public_jwk(private, header["kid"]), private, secret)
    yield from _other_headers(header, sign)
    yield from _other_claims(header, sign)
    yield from _other_spellings(good)
    yield from _changed(good, random.Random(seed))
    yield from _wholly_else(good, random.Random(seed))


def _unsigned(header: dict[str, Any], good: str) -> Iterator[str]:
    signature = good.rpartition(".")[2]
    for algorithm in ALGORITHMS:
        message = signing_input(header | {"alg": algorithm}, CLAIMS)
        for ending in ("", signature, "e30", encode(bytes(32)), encode(bytes(64)), encode(b"none")):
            yield f"{message}.{ending}"
        yield message
        yield f"{message}.{encode(hmac.digest(b'', message.encode(), hashlib.sha256))}"
        yield f"{message}.{encode(hmac.digest(b'secret', message.encode(), hashlib.sha256))}"


def _confused(header: dict[str, Any], row: dict[str, Any], private: PrivateKey, secret: bytes) -> Iterator[str]:
    """Tokens whose HMAC key is the public key, in every spelling under which the world may have it."""
    digests = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512, header["alg"]: hashlib.sha256}
    for spelling in [*_spellings(row, private), secret, b"", b"\0"]:
        for algorithm, digest in digests.items():
            for kid in ({"kid": header["kid"]}, {}):
                message = signing_input({"alg": algorithm, "typ": "JWT", **kid}, CLAIMS)
                yield f"{message}.{encode(hmac.digest(spelling, message.encode(), digest))}"


def _spellings(row: dict[str, Any], private: PrivateKey) -> list[bytes]:
    encoding, form = serialization.Encoding, serialization.PublicFormat
    public = private.public_key()
    pem = public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo)
    spellings = [
        pem,
        pem.strip(),
        pem.replace(b"\n", b"\r\n"),
        b"".join(pem.splitlines()[1:-1]),
        public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        public.public_bytes(encoding.OpenSSH, form.OpenSSH),
        public.public_bytes(encoding.OpenSSH, form.OpenSSH) + b"\n",
        json.dumps(row).encode(),
        json.dumps(row, separators=(",", ":")).encode(),
        json.dumps({"keys": [row]}).encode(),
        row["kid"].encode(),
        *(value.encode() for name, value in row.items() if name in {"n", "e", "x", "y"}),
        *(decode(value) for name, value in row.items() if name in {"n", "e", "x", "y"}),
    ]
    if row["kty"] == "RSA":
        spellings += [public.public_bytes(kind, form.PKCS1) for kind in (encoding.PEM, encoding.DER)]
    else:
        spellings += [
            public.public_bytes(encoding.X962, kind) for kind in (form.CompressedPoint, form.UncompressedPoint)
        ]
    return spellings


def _other_headers(header: dict[str, Any], sign: Sign) -> Iterator[str]:
    for algorithm in ALGORITHMS:
        yield sign(header | {"alg": algorithm}, CLAIMS)
    for kid in KIDS:
        yield sign(header | {"kid": kid}, CLAIMS)
    for extra in HEADERS:
        yield sign(header | extra, CLAIMS)
        yield sign(extra | header, CLAIMS) if set(extra).isdisjoint(header) else sign(extra, CLAIMS)
    text = json.dumps(header).encode()
    for raw in RAW_HEADERS:
        yield sign(raw.replace(b"%b", text), CLAIMS)
    for name, value in header.items():
        doubled = f'"{name}":{json.dumps(value)},'.encode()
        yield sign(text.replace(b"{", b"{" + doubled, 1), CLAIMS)
    yield sign(text[:-1] + b' ,"cty":"' + b"c" * 400 + b'"}', CLAIMS)


def _other_claims(header: dict[str, Any], sign: Sign) -> Iterator[str]:
    for name in CLAIMS:
        yield sign(header, claims_with(**{name: ...}))
    for name in (*CLAIMS, "nbf", "jti"):
        for value in VALUES:
            if not _harmless(name, value):
                yield sign(header, claims_with(**{name: value}))
    for changes in (*TIMES, *TEXTS):
        yield sign(header, claims_with(**changes))
    text = json.dumps(CLAIMS).encode()
    exp = f'"exp": {NOW + 600}'.encode()
    for other in (b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity", b"1" * 2500, b"0x7fffffff", b"1_800_000_600"):
        yield sign(header, text.replace(exp, b'"exp": ' + other))
    for name in CLAIMS:
        yield sign(header, text[:-1] + f', "{name}": {json.dumps(CLAIMS[name])}}}'.encode())
    for payload in (
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"{",
        b'""',
        b"1",
        text[:-1],
        text + text,
        b"\xef\xbb\xbf" + text,
        text + b"\0",
    ):
        yield sign(header, payload)
    yield sign(header, text[:-1] + b', "x":' + b"[" * 1300 + b"]" * 1300 + b"}")
    yield sign(header, text[:-1] + b', "x":' + b'{"a":' * 400 + b"1" + b"}" * 400 + b', "exp": 1}')
    yield sign(header, text[:-1] + b', "x": "' + b"x" * 4000 + b'"}')


def _harmless(name: str, value: Any) -> bool:
    """What is no fault of that claim: a time before now as `nbf`, plain text as a name, no scopes at all."""
    if name == "nbf":
        return type(value) is int and 0 <= value <= NOW
    if name in {"sub", "jti"}:
        return isinstance(value, str) and 0 < len(value) < 256 and value.isprintable()
    return name == "scope" and value in ("", "null", "true")


def _other_spellings(good: str) -> Iterator[str]:
    """The same bytes as a lenient decoder would read them out of other text."""
    parts = good.split(".")
    for place in range(3):
        part = parts[place]
        others = [
            part + junk for junk in ("=", "==", "====", "\n", "\r\n", " ", "\t", "!", "\0", "é", "\u2028", "\ud800")
        ]
        others += [junk + part for junk in ("=", " ", "\n", "\0", "\ufeff", "-", "_")]
        for at in (1, len(part) // 2, len(part) - 1):
            others += [
                part[:at] + junk + part[at:] for junk in ("\n", " ", "!", "*", "=", "\r\n", ".", "\0", "%20", "+")
            ]
        others += [part.replace("-", "+").replace("_", "/") + "+", part.lower(), part.upper(), part[::-1], ""]
        others += ["".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in part), part + part, part[:-1]]
        others += _same_bits(part)
        for other in others:
            if other != part:
                yield ".".join([*parts[:place], other, *parts[place + 1 :]])
    head, payload, signature = parts
    yield from (
        f" {good}",
        f"{good}.",
        f".{good}",
        f"{good}.{signature}",
        f"{good} {good}",
        f"{good},{good}",
        f"\t{good}",
    )
    yield from (
        f'"{good}"',
        f"<{good}>",
        f"Bearer {good}",
        f"{payload}.{head}.{signature}",
        f"{head}.{signature}.{payload}",
    )
    yield from (good.replace(".", ".."), good.replace(".", ","), good.replace(".", " . "), good.replace(".", "%2E"))
    yield json.dumps({"protected": head, "payload": payload, "signature": signature})
    yield json.dumps({"payload": payload, "signatures": [{"protected": head, "signature": signature}]})


def _same_bits(part: str) -> list[str]:
    """Other last characters that decode to the same bytes, where the last one carries bits that are dropped."""
    dropped = {2: 4, 3: 2}.get(len(part) % 4, 0)
    last = _ALPHABET.index(part[-1])
    base = last >> dropped << dropped
    return [part[:-1] + _ALPHABET[base | low] for low in range(1 << dropped) if base | low != last]


def _changed(good: str, chance: random.Random) -> Iterator[str]:
    """One character changed, lost, doubled or swapped with the next, at every place."""
    for at, character in enumerate(good):
        other = chance.choice(_ALPHABET.replace(character, ""))
        yield good[:at] + other + good[at + 1 :]
        yield good[:at] + good[at + 1 :]
        yield good[:at] + character + good[at:]
        if at + 1 < len(good) and good[at + 1] != character:
            yield good[:at] + good[at + 1] + character + good[at + 2 :]
    signature = decode(good.rpartition(".")[2])
    for bit in range(0, 8 * len(signature), 3):
        turned = bytearray(signature)
        turned[bit // 8] ^= 1 << bit % 8
        yield good.rpartition(".")[0] + "." + encode(bytes(turned))
    for length in range(len(signature)):
        yield good.rpartition(".")[0] + "." + encode(signature[:length])


def _wholly_else(good: str, chance: random.Random) -> Iterator[str]:
    yield from ("", ".", "..", "...", "a.b.c", "null", "undefined", "0", "\0", "true", "{}", "a." * 2000, "." * 4000)
    yield ".".join(["eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0", "", "AAAA", "AAAA", "AAAA"])
    yield ".".join(
        [encode(b'{"alg":"dir","enc":"A256GCM","zip":"DEF"}'), "", "AAAAAAAAAAAAAAAA", encode(bytes(2000)), "AAAA"]
    )
    yield good + "A" * 4096
    for length in (1, 8, 32, 43, 44, 55, 56, 64, 128, 1000, 4000):
        yield "".join(chance.choice(_ALPHABET) for _ in range(length))
        yield "gk_" + "".join(chance.choice(_ALPHABET) for _ in range(length))
        yield ".".join("".join(chance.choice(_ALPHABET) for _ in range(length)) for _ in range(3))
    for _ in range(60):
        yield (
            "gk_"
            + "".join(chance.choice("abcdefghijklmnopqrstuvwxyz234567") for _ in range(8))
            + "_"
            + "".join(chance.choice(_ALPHABET) for _ in range(43))
        )
        yield "".join(chr(chance.choice([chance.randrange(1, 256), chance.randrange(32, 127)])) for _ in range(80))
