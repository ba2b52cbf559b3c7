"""The access log: one JSON object a line whatever is sent, and none of the secrets in it."""

from __future__ import annotations

import pytest

from tests.docker.edge.framings import MUTATIONS
from tests.docker.edge.process import HOST, EdgeProcess
from tests.docker.edge.recorder import Recorder
from tests.integration.processes import GatewayProcess

pytestmark = pytest.mark.integration

CANARY = "canary5ecret"


def test_secrets_are_not_logged_wherever_they_are_put(recorder: Recorder) -> None:
    with EdgeProcess([recorder.address]) as edge:
        head = f"Host: {HOST}\r\nAuthorization: Bearer {CANARY}\r\nCookie: {CANARY}\r\nUser-Agent: {CANARY}\r\n"
        for line in (
            f"GET /health?token={CANARY} HTTP/1.1",
            f"GET /v2/eyJ{CANARY} HTTP/1.1",
            f"GET /v2/gk_{CANARY} HTTP/1.1",
            f"GET /nowhere?{CANARY} HTTP/1.1",
            f"{CANARY.upper()} /health HTTP/1.1",
            f"GET /health#{CANARY} HTTP/1.1",
            f"GET https://{CANARY}@{HOST}/health HTTP/1.1",
            f"GET /{'a' * 8000}{CANARY} HTTP/1.1",
        ):
            edge.say(f"{line}\r\n{head}Connection: close\r\n\r\n".encode())
        edge.say(f"POST /v2/open HTTP/1.1\r\n{head}Content-Length: 12\r\n\r\n{CANARY}".encode())
        recorder.answer = b""  # the gateway ends without an answer
        edge.say(f"GET /health?{CANARY} HTTP/1.1\r\n{head}\r\n".encode())
        assert len(edge.log_lines()) == 10
        assert CANARY not in edge.log()
        assert CANARY.upper() not in edge.log()


def test_every_request_is_one_line_that_parses(recorder: Recorder) -> None:
    odd = ["\x1b[31m", "\u2028", "\xff\xfe", '"},{"', "\\", "%0a", "\t", "a" * 300, "\x7f"]
    with EdgeProcess([recorder.address]) as edge:
        for text in odd:
            edge.say(
                f"GET /v2/{text} HTTP/1.1\r\nHost: {HOST}\r\nX-Request-Id: {text}\r\n\r\n".encode(),
                patience_s=0.2,
            )
        for mutation in MUTATIONS.values():
            edge.say(mutation)
        lines = edge.log_lines()
    assert len(lines) >= len(odd) + len(MUTATIONS)
    assert {type(line["status"]) for line in lines} == {int}
    for line in lines:
        assert len(line["path"]) <= 256
        assert all(" " <= char <= "~" for value in line.values() for char in str(value))


def test_a_line_tells_who_asked_what_and_how_long_it_took(front: EdgeProcess, gateway: GatewayProcess) -> None:
    with front.client(source="127.0.0.30", headers=gateway.headers()) as client:
        answer = client.get("/v2?x=y")
        refused = client.post("/v2/x", content=bytes(2 << 20))
    lines = [line for line in front.log_lines() if line["client"] == "127.0.0.30"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/v2", 200),
        ("POST", "/v2/x", 413),
    ]
    served, turned_away = lines
    assert served["gateway_request_id"] == answer.headers["X-Request-Id"]
    assert served["gateway"] == f"127.0.0.1:{gateway.port}"
    assert 0 <= served["seconds"] < 5
    assert turned_away["request_id"] == refused.headers["X-Request-Id"]
    assert turned_away["gateway"] == ""
