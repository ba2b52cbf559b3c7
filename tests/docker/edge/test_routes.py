"""What can be asked through the edge, by whom; and that the path it compares is the path that is routed."""

from __future__ import annotations

import httpx
import pytest

from tests.docker.edge.process import HOST, EdgeProcess
from tests.docker.edge.recorder import Recorder
from tests.integration.processes import GatewayProcess

pytestmark = pytest.mark.integration

OPERATOR, STRANGER = "127.0.0.9", "127.0.0.1"

PUBLIC = {
    "/health",
    "/health/live",
    "/health/ready",
    "/ray-serve/predict",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/stats",
    "/v2/models/{model}",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/ready",
    "/v2/models/{model}/stats",
    "/v2/models/{model}/versions/{version}",
    "/v2/models/{model}/versions/{version}/infer",
    "/v2/models/{model}/versions/{version}/ready",
    "/v2/models/{model}/versions/{version}/stats",
}
OPERATORS = {
    *("/rollout", "/rollout/start", "/rollout/pause", "/rollout/resume", "/rollout/promote", "/rollout/rollback"),
    *("/rollout/outcomes", "/rollout/report", "/kill"),
    *("/stats", "/ray-serve/stats", "/docs", "/docs/favicon.png", "/openapi.json"),
}
INSIDE = {"/metrics"}


def path_of(template: str) -> str:
    return template.replace("{model}", "cnn_lstm").replace("{version}", "1")


def ask(edge: EdgeProcess, gateway: GatewayProcess, source: str, path: str, method: str = "GET") -> httpx.Response:
    with edge.client(source=source, headers=gateway.headers()) as client:
        return client.request(method, path)


def came_from_the_gateway(response: httpx.Response) -> bool:
    return "Server-Timing" in response.headers


def test_every_route_of_the_gateway_has_its_place(gateway: GatewayProcess) -> None:
    """A new route is public, for operators or for the inside: somebody has to say which, here and in the edge."""
    document = httpx.get(f"{gateway.url}/openapi.json", trust_env=False).json()
    infer = {path.replace("cnn_lstm", "{model}") for path in document["paths"]}
    assert infer | {"/docs", "/docs/favicon.png", "/openapi.json"} == PUBLIC | OPERATORS | INSIDE
    methods = {method.upper() for operations in document["paths"].values() for method in operations}
    assert methods <= {"GET", "HEAD", "OPTIONS", "POST", "PUT"}


@pytest.mark.parametrize("template", sorted(PUBLIC))
def test_what_is_public_is_passed_on(front: EdgeProcess, gateway: GatewayProcess, template: str) -> None:
    assert came_from_the_gateway(ask(front, gateway, STRANGER, path_of(template)))


@pytest.mark.parametrize("template", sorted(OPERATORS))
def test_operators_routes_are_there_for_their_networks_alone(
    front: EdgeProcess, gateway: GatewayProcess, template: str
) -> None:
    assert came_from_the_gateway(ask(front, gateway, OPERATOR, path_of(template)))
    refused = ask(front, gateway, STRANGER, path_of(template))
    assert refused.status_code == 404
    assert not came_from_the_gateway(refused)


@pytest.mark.parametrize(
    "path", [*sorted(INSIDE), "/", "/admin", "/api/jobs/", "/-/routes", "/favicon.ico", "/healthz"]
)
def test_everything_else_is_not_there_for_anybody(front: EdgeProcess, gateway: GatewayProcess, path: str) -> None:
    for source in (STRANGER, OPERATOR):
        refused = ask(front, gateway, source, path)
        assert refused.status_code == 404
        assert not came_from_the_gateway(refused)


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "PURGE", "X"])
def test_methods_that_no_route_serves_are_refused(front: EdgeProcess, gateway: GatewayProcess, method: str) -> None:
    target = f"{HOST}:443" if method == "CONNECT" else "/v2"
    said = front.say(f"{method} {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    assert said.statuses == [405] or (method == "CONNECT" and said.statuses == [400])
    assert b"Server-Timing" not in said.data


# Ways to write /metrics, /rollout and /stats that some reader takes for them and some other for something public.
DISGUISES = [
    "/metrics/",
    "//metrics",
    "/./metrics",
    "/v2/../metrics",
    "/v2/..%2fmetrics",
    "/v2/%2e%2e/metrics",
    "/v2/.%2e/metrics",
    "/v2/%252e%252e/metrics",
    "/v2/..;/metrics",
    "/v2;/../metrics",
    "/v2/..\\metrics",
    "/v2/..%5cmetrics",
    "/%6detrics",
    "/metrics%00",
    "/metrics%20",
    "/metrics;x",
    "/metrics.",
    "/METRICS",
    "/v2//../rollout",
    "/v2/%2e%2e/rollout",
    "/%72ollout",
    "/rollout/",
    "/rollout;/health",
    "/health/../stats",
    "/health/live/../../stats",
    "/v2/#/../../metrics",
    "/v2/x/../../ray-serve/stats",
    "/v2/..%c0%afmetrics",
    "/v2/%ef%bc%8e%ef%bc%8e/metrics",
    "http://other.test/metrics",
    f"https://{HOST}/metrics",
    f"https://{HOST}/v2/../stats",
    f"https://{HOST}//stats",
    "/v2?/../metrics",
    "/health/ready?x=/metrics",
]


@pytest.mark.parametrize("target", DISGUISES)
def test_no_spelling_leads_to_what_is_withheld(edge: EdgeProcess, recorder: Recorder, target: str) -> None:
    edge.say(f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
    for request in recorder.requests:
        path = request.target.partition(b"?")[0]
        assert path in (b"/v2", b"/health/ready")


@pytest.mark.parametrize(
    "target", ["/v2/a%2fb", "/v2/a%41", "/v2//a", "/v2/./a", "/v2/a/..", "/v2/a;b", "/v2/a\\b", "/v2/\xe9"]
)
def test_a_target_that_could_be_written_otherwise_is_refused(
    edge: EdgeProcess, recorder: Recorder, target: str
) -> None:
    said = edge.say(f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode("latin-1"))
    assert said.statuses in ([400], [404])
    assert said.ended
    assert not recorder.requests


@pytest.mark.parametrize(
    "target", ["/v2", "/v2/models/cnn_lstm/versions/1.0-rc_1/infer", "/v2/..a", "/health?a=%2f..//;"]
)
def test_a_plain_target_is_passed_on_byte_by_byte(edge: EdgeProcess, recorder: Recorder, target: str) -> None:
    said = edge.say(f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
    assert said.statuses == [200]
    assert [request.target for request in recorder.requests] == [target.encode()]


@pytest.mark.parametrize(
    "host", ["other.test", "a/../health?", f"{HOST}.other.test", f"x{HOST}", "127.0.0.1", "[::1]", f"{HOST}@other.test"]
)
def test_another_host_is_not_served(edge: EdgeProcess, recorder: Recorder, host: str) -> None:
    said = edge.say(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert said.statuses in ([421], [400])
    assert said.ended
    assert not recorder.requests


@pytest.mark.parametrize("host", [HOST, HOST.upper(), f"{HOST}:8443", f"{HOST}."])
def test_the_gateway_gets_the_plain_name_of_the_host(edge: EdgeProcess, recorder: Recorder, host: str) -> None:
    said = edge.say(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert said.statuses == [200]
    assert recorder.requests[0].header("Host") == [HOST]


def test_old_http_without_a_host_is_not_served(edge: EdgeProcess, recorder: Recorder) -> None:
    assert edge.say(b"GET /health HTTP/1.0\r\n\r\n").statuses == [421]
    assert b"misdirected" in edge.say(b"GET /health\r\n").data  # HTTP/0.9 knows no status
    assert not recorder.requests


def test_a_prediction_goes_through(front: EdgeProcess, gateway: GatewayProcess) -> None:
    headers = {**gateway.headers(), "Content-Type": "application/octet-stream", "X-Request-Id": "mine"}
    for http2 in (False, True):
        with front.client(http2=http2, headers=headers) as client:
            answer = client.post("/ray-serve/predict", content=bytes(50 * 60 * 4))
        assert answer.status_code == 200
        assert answer.json()["client_request_id"] == "mine"
        assert answer.headers["X-Served-By"] == "legacy"
