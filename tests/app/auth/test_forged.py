"""Thousands of forged and malformed credentials against a whole gateway: none opens it, none breaks it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from fastapi import FastAPI

from app.errors import Unauthenticated
from tests.app.auth.corpus import forgeries
from tests.app.auth.signing import (
    CLAIMS,
    HEADER,
    SECRET,
    Clock,
    algorithm_of,
    ec_key,
    encode,
    jwks,
    key_of,
    public_jwk,
    rsa_key,
    sign,
    sign_with,
    verifier_of,
)
from tests.app.test_over_sockets import listening
from tests.app.under_test import GatewayUnderTest, MakeGateway

HMAC = {"private": None, "secret": SECRET, "header": HEADER, "sign": sign}
KINDS = ["HS256", "RS256", "ES256"]


def corpus_of(kind: str) -> dict[str, Any]:
    """What the forger of this kind of gateway has."""
    if kind == "HS256":
        return HMAC
    private = rsa_key() if kind == "RS256" else ec_key()
    header = {"alg": algorithm_of(private), "typ": "JWT", "kid": "k1"}
    return {
        "private": private,
        "secret": SECRET,
        "header": header,
        "sign": lambda header, claims: sign_with(private, header, claims),
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def gateway(make_gateway: MakeGateway, tmp_path: Path, kind: str) -> AsyncIterator[GatewayUnderTest]:
    """A gateway of that kind, which tells every failure 401."""
    options: dict[str, Any] = {"jwt_secret": SECRET.decode()}
    if kind != "HS256":
        file = tmp_path / "jwks.json"
        file.write_bytes(jwks(public_jwk(rsa_key() if kind == "RS256" else ec_key(), "k1")))
        file.chmod(0o644)
        options = {"jwt_secret": None, "jwt_jwks_file": file}
    async with make_gateway(**options, auth_failures_per_min=10_000) as gateway:
        yield gateway


async def ask(app: FastAPI, authorization: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of a request with these bytes as its Authorization."""
    got: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        got.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/v2",
        "raw_path": b"/v2",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"gateway"), (b"authorization", authorization)],
        "client": ("192.0.2.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    await app(scope, receive, send)
    return got[0]["status"], dict(got[0]["headers"]), b"".join(message.get("body", b"") for message in got[1:])


async def test_no_forgery_opens_the_gateway_or_breaks_it(gateway: GatewayUnderTest, kind: str) -> None:
    corpus = corpus_of(kind)
    assert (await ask(gateway.app, b"Bearer " + corpus["sign"](corpus["header"], CLAIMS).encode()))[0] == 200
    statuses: Counter[int] = Counter()
    answers = set()
    for token in forgeries(**corpus):
        status, headers, body = await ask(gateway.app, b"Bearer " + token.encode("utf-8", "surrogatepass"))
        statuses[status] += 1
        answers.add((headers[b"www-authenticate"], headers[b"content-type"], body))
        assert status == 401, token
    assert len(answers) == 1  # below /v2 a refusal holds no id, so that all of them are one
    assert statuses[401] >= 2000
    print(f"\n{kind}: {statuses[401]} credentials, all 401")


@pytest.mark.parametrize("kind", ["HS256"])
async def test_forgeries_over_real_sockets_are_401_or_no_request_at_all(gateway: GatewayUnderTest, kind: str) -> None:
    tokens = list(forgeries(**corpus_of(kind)))[::7]
    statuses: Counter[int] = Counter()
    async with listening(gateway.app) as port:
        for token in tokens:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"GET /v2 HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nAuthorization: Bearer "
            writer.write(head + token.encode("utf-8", "surrogatepass") + b"\r\n\r\n")
            async with asyncio.timeout(5):
                statuses[int((await reader.read(65536)).split(b" ", 2)[1])] += 1
            writer.close()
    assert set(statuses) <= {400, 401}  # 400: a line end or a NUL inside of a header is no HTTP
    assert statuses[401] > 200


async def test_a_refusal_quotes_nothing_of_what_was_sent(gateway: GatewayUnderTest) -> None:
    for token in ("canary-canary-canary", "gk_canarycc_" + "c" * 43, sign({"alg": "none", "kid": "canary"}, CLAIMS)):
        response = await gateway.client.get("/stats", headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == 401
        assert len(response.content) < 4096
        assert token not in response.text
        assert "canary" not in response.text
        assert set(orjson.loads(response.content)) == {"type", "title", "status", "detail", "instance"}
    await asyncio.sleep(0.3)
    assert b"canary" not in gateway.log.getvalue()


BOMBS = {
    "a nested header": sign(b'{"alg":"HS256","kid":' + b"[" * 1200 + b"]" * 1200 + b"}", CLAIMS),
    "a nested header that fits": sign(b'{"kid":' + b"[" * 180 + b"]" * 180 + b"}", CLAIMS),
    "nested claims": sign(HEADER, b'{"x":' + b"[" * 1400 + b"]" * 1400 + b"}"),
    "an integer of thousands of digits": sign(HEADER, b'{"exp":' + b"9" * 2800 + b"}"),
    "a megabyte": "a" * (1 << 20),
    "a megabyte of dots": "." * (1 << 20),
    "five parts": ".".join(
        [encode(b'{"alg":"dir","enc":"A256GCM","zip":"DEF"}'), "", "AAAA", encode(bytes(2900)), "AAAA"]
    ),
    "many names": sign(HEADER, b"{" + b",".join(b'"%d":0' % n for n in range(380)) + b"}"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_less_than_five_milliseconds(name: str) -> None:
    verifier = verifier_of(Clock())
    durations = []
    for _ in range(5):
        started_at = time.perf_counter()
        with pytest.raises(Unauthenticated):
            verifier.verify(BOMBS[name])
        durations.append(time.perf_counter() - started_at)
    assert min(durations) < 0.005


def test_headers_that_name_an_address_or_a_file_cause_neither_a_connection_nor_a_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection or a file was tried")

    verifiers = {private: verifier_of(Clock(), {"k1": key_of(private)}) for private in (rsa_key(), ec_key())}
    for place in ("socket.socket.connect", "os.open", "builtins.open", "io.open"):
        monkeypatch.setattr(place, connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    for private, verifier in verifiers.items():
        header = {"alg": algorithm_of(private), "kid": "k1"}
        for extra in (
            {"jku": "http://127.0.0.1:9/k"},
            {"x5u": "http://127.0.0.1:9/k"},
            {"kid": "/dev/null"},
        ):
            with pytest.raises(Unauthenticated):
                verifier.verify(sign_with(private, header | extra, CLAIMS))
