from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.errors import PROBLEM_JSON, problem_of
from app.front import MAX_HEADERS, Front, has_its_host
from tests.app.under_test import GatewayUnderTest, MakeGateway

HOST = (b"host", b"gateway")


def fault(*headers: tuple[bytes, bytes], version: str = "1.1", path: str = "/stats", hosts: Any = ()) -> int:
    """The status of the refusal, 0 for none."""
    scope = {"http_version": version, "headers": list(headers), "path": path}
    error = Front(hosts=hosts).fault_in(scope)
    return 0 if error is None else problem_of(error).status


@pytest.mark.parametrize(
    ("headers", "version", "status"),
    [
        ([HOST], "1.1", 0),
        ([HOST], "1.0", 0),
        ([], "1.0", 0),
        ([], "1.1", 400),
        ([HOST, HOST], "1.1", 400),
        ([HOST, (b"host", b"other")], "1.0", 400),
        ([(b"host", b"")], "1.1", 0),
        ([HOST, (b"transfer-encoding", b"chunked")], "1.1", 0),
        ([HOST, (b"transfer-encoding", b"Chunked")], "1.1", 0),
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"gzip"), (b"transfer-encoding", b"chunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"chunked, chunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"chunked "), (b"x_of_their_own", b"5")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"\x0bchunked")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"chunked;q=1")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"identity")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"")], "1.1", 400),
        ([HOST, (b"transfer-encoding", b"chunked")], "1.0", 400),
        ([HOST, (b"transfer_encoding", b"chunked")], "1.0", 400),
        ([HOST, (b"x_forwarded_for", b"192.0.2.1")], "1.1", 400),
        ([HOST, (b"content_length", b"5")], "1.1", 400),
        ([HOST, (b"transfer_encoding", b"chunked")], "1.1", 400),
        ([HOST, (b"x_route_to", b"legacy")], "1.1", 400),
        ([HOST, (b"x_of_their_own", b"5")], "1.1", 0),
        ([HOST, (b"x-forwarded-for", b"192.0.2.1")], "1.1", 0),
        ([HOST], "2.0", 400),
        ([HOST], "0.9", 400),
    ],
)
def test_what_servers_have_read_in_different_ways_is_refused(
    headers: list[tuple[bytes, bytes]], version: str, status: int
) -> None:
    assert fault(*headers, version=version) == status


@pytest.mark.parametrize(
    ("target", "hosts", "is_its_own"),
    [
        (b"/stats", [b"a"], True),
        (b"/stats", [], True),
        (b"//b/stats", [b"a"], True),
        (b"http://a/stats", [b"a"], True),
        (b"HTTP://A:80?x", [b"a:80"], True),
        (b"https://a", [b"a"], True),
        (b"http://b/stats", [b"a"], False),
        (b"http://a:80/stats", [b"a"], False),
        (b"http://x@a/stats", [b"a"], False),
        (b"http://a/stats", [], False),
        (b"http://a/stats", [b"a", b"a"], False),
        (b"http:///stats", [b""], False),
        (b"ftp://a/stats", [b"a"], False),
        (b"a:80", [b"a:80"], False),
        (b"*", [b"a"], False),
        (b"", [b"a"], False),
    ],
)
def test_a_target_that_names_a_host_names_that_of_the_header(
    target: bytes, hosts: list[bytes], is_its_own: bool
) -> None:
    assert has_its_host(target, [(b"host", host) for host in hosts]) is is_its_own


@pytest.mark.parametrize("host", [b"desk.example", b"DESK.example:8443", b"[::1]:8000", b"[::1]", b"127.0.0.1:1"])
def test_the_gateway_is_called_by_its_names(host: bytes) -> None:
    assert fault((b"host", host), hosts={"desk.example", "[::1]", "127.0.0.1"}) == 0


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"desk.example.evil", b"", b":80", b"a/../health?", b"desk.example@evil", b"desk.example:x"],
)
def test_it_is_called_by_no_other(host: bytes) -> None:
    assert fault((b"host", host), hosts={"desk.example"}) == 400
    assert fault(hosts={"desk.example"}, version="1.0") == 400


@pytest.mark.parametrize(
    "path", ["/stats\n", "/stats\r", "/st\x00ats", "/stats\u2028", "/st\u0430ts", "/\x7f", "/\x1b[31m"]
)
def test_no_route_has_such_a_path(path: str) -> None:
    assert fault(HOST, path=path) == 404


def test_more_headers_than_any_client_needs_are_431() -> None:
    assert fault(*[HOST] * 1, *[(b"a", b"b")] * (MAX_HEADERS - 1)) == 0
    assert fault(*[HOST] * 1, *[(b"a", b"b")] * MAX_HEADERS) == 431


async def test_a_refused_head_is_a_problem_logged_and_counted_and_closes_the_connection(
    gateway: GatewayUnderTest,
) -> None:
    for path in ("/stats", "/ray-serve/predict", "/v2/models/cnn_lstm/infer"):
        response = await gateway.client.post(path, headers=[("Host", "a"), ("Host", "b")])
        assert response.status_code == 400
        assert response.headers["connection"] == "close"
        assert "x-request-id" in response.headers
        if not path.startswith("/v2"):
            assert response.headers["content-type"] == PROBLEM_JSON
    metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    assert 'http_requests_total{handler="none",method="POST",status="400"} 3.0' in metrics


async def test_one_line_is_logged_for_a_refused_head(make_gateway: MakeGateway) -> None:
    async with make_gateway(allowed_hosts="gateway") as gateway:
        assert (await gateway.client.get("/stats")).status_code == 401
        assert (await gateway.client.get("/stats", headers={"Host": "qx-mark"})).status_code == 400
        for path in ("/stats%0a", "/health%00"):
            assert (await gateway.client.get(path)).status_code == 404
    lines = [line for line in gateway.log_lines() if line["event"] == "request"]
    assert [line["status"] for line in lines] == [401, 400, 404, 404]
    assert [line["route"] for line in lines] == ["/stats", "none", "none", "none"]
    assert "qx-mark" not in gateway.log.getvalue().decode().replace("http://gateway", "")


# --- browsers


OURS = "https://desk.example"


def cross_origin(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("access-control")}


async def preflight(gateway: GatewayUnderTest, origin: str, path: str = "/ray-serve/predict") -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return await gateway.client.options(path, headers=headers)


ORIGINS = [
    OURS,
    "https://desk.example:443",
    "https://desk.example.evil",
    "https://evil.desk.example",
    "http://desk.example",
    "https://DESK.example",
    "https://desk.example/",
    "null",
    "*",
    "",
    f"{OURS}, https://evil",
]


@pytest.mark.parametrize("origin", ORIGINS)
async def test_no_page_of_another_origin_may_call_by_default(gateway: GatewayUnderTest, origin: str) -> None:
    for path in ("/ray-serve/predict", "/health", "/rollout"):
        refused = await preflight(gateway, origin, path)
        assert refused.status_code == 405
        assert "allow" in refused.headers
        assert cross_origin(refused) == {}
    for response in (
        await gateway.predict(headers={"Origin": origin}),
        await gateway.client.get("/health/live", headers={"Origin": origin}),
    ):
        assert response.status_code == 200
        assert cross_origin(response) == {}


@pytest.mark.parametrize("origin", ORIGINS)
async def test_only_the_very_origins_of_the_setting_may_call(make_gateway: MakeGateway, origin: str) -> None:
    async with make_gateway(cors_origins=f"{OURS}, https://ops.example:8443") as gateway:
        asked = await preflight(gateway, origin)
        answered = await gateway.predict(headers={"Origin": origin})
        refused = await gateway.client.get("/stats", headers={"Origin": origin})
        assert (answered.status_code, refused.status_code) == (200, 401)
        for response in (asked, answered, refused):
            assert response.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in response.headers
        if origin == OURS:
            assert asked.status_code == 204
            assert "Authorization" in asked.headers["access-control-allow-headers"]
            assert all(
                response.headers["access-control-allow-origin"] == OURS for response in (asked, answered, refused)
            )
        else:
            assert asked.status_code == 405
            assert cross_origin(asked) == cross_origin(answered) == cross_origin(refused) == {}


async def test_two_origins_are_none(make_gateway: MakeGateway) -> None:
    async with make_gateway(cors_origins=OURS) as gateway:
        response = await gateway.client.get("/health/live", headers=[("Origin", OURS), ("Origin", OURS)])
        assert cross_origin(response) == {}


async def test_an_options_that_is_no_preflight_is_405(make_gateway: MakeGateway) -> None:
    async with make_gateway(cors_origins=OURS) as gateway:
        assert (await gateway.client.options("/stats", headers={"Origin": OURS})).status_code == 405


async def test_browsers_are_told_to_keep_to_tls_only_where_there_is_some(make_gateway: MakeGateway) -> None:
    for behind_tls in (True, False):
        async with make_gateway(behind_tls=behind_tls) as gateway:
            for path in ("/health/live", "/nope", "/stats"):
                response = await gateway.client.get(path)
                assert ("strict-transport-security" in response.headers) == behind_tls


@pytest.mark.parametrize("method", ["TRACE", "TRACK", "PROPFIND", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
async def test_methods_that_no_route_has_are_405_and_told_which_it_has(gateway: GatewayUnderTest, method: str) -> None:
    for path, allowed in (
        ("/ray-serve/predict", "POST"),
        ("/v2/models/cnn_lstm/infer", "POST"),
        ("/v2/models/cnn_lstm/versions/1/infer", "POST"),
        ("/health", "GET"),
        ("/rollout", "GET, PUT"),
    ):
        response = await gateway.client.request(method, path, headers={"X-Mark": "qx-mark"})
        assert response.status_code == 405, path
        assert response.headers["allow"] == allowed
        assert "qx-mark" not in response.text


async def test_the_page_of_the_documentation_runs_its_own_scripts_alone(gateway: GatewayUnderTest) -> None:
    policy = (await gateway.client.get("/docs")).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    (scripts,) = [part for part in policy.split("; ") if part.startswith("script-src")]
    assert "'sha256-" in scripts
    assert "unsafe" not in scripts


@pytest.mark.parametrize("ranges", ["bytes=0-0", "bytes=5-1", "bytes=x", "bytes=0-0,1-1,2-2", "x=1"])
async def test_a_file_comes_whole_whatever_part_is_asked_for(gateway: GatewayUnderTest, ranges: str) -> None:
    whole = await gateway.client.get("/docs/swagger-ui.css")
    part = await gateway.client.get("/docs/swagger-ui.css", headers={"Range": ranges})
    assert part.status_code == 200
    assert part.content == whole.content
