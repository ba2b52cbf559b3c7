"""Who may use which route: every route with every kind of principal, and the models that a principal may use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.deps import PUBLIC_PATHS
from app.auth import ApiKeyFile, Principal, make_key, mint_token
from app.settings import Settings
from tests.app.api.routes import routes_of
from tests.app.under_test import NOW, GatewayUnderTest, MakeGateway, some_windows

SCOPES = ("predict", "ops", "admin", "features")
# The one scope that opens a route; one that is missing here fails the test that walks them all.
NEEDED = {
    ("POST", "/ray-serve/predict"): "predict",
    ("GET", "/ray-serve/stats"): "ops",
    ("GET", "/stats"): "ops",
    ("GET", "/metrics"): "ops",
    ("GET", "/rollout"): "ops",
    ("PUT", "/rollout"): "admin",
    ("POST", "/rollout/start"): "admin",
    ("POST", "/rollout/pause"): "admin",
    ("POST", "/rollout/resume"): "admin",
    ("POST", "/rollout/promote"): "admin",
    ("POST", "/rollout/rollback"): "admin",
    ("GET", "/rollout/report"): "ops",
    ("POST", "/rollout/outcomes"): "admin",
    ("GET", "/kill"): "ops",
    ("PUT", "/kill"): "admin",
    ("GET", "/v2"): "predict",
    ("GET", "/v2/models/stats"): "predict",
    ("GET", "/v2/models/{model}"): "predict",
    ("GET", "/v2/models/{model}/ready"): "predict",
    ("GET", "/v2/models/{model}/stats"): "predict",
    ("POST", "/v2/models/{model}/infer"): "predict",
    ("GET", "/v2/models/{model}/versions/{version}"): "predict",
    ("GET", "/v2/models/{model}/versions/{version}/ready"): "predict",
    ("GET", "/v2/models/{model}/versions/{version}/stats"): "predict",
    ("POST", "/v2/models/{model}/versions/{version}/infer"): "predict",
}
COMBINATIONS = [set(some) for size in range(len(SCOPES) + 1) for some in combinations(SCOPES, size)]


def api_key(settings: Settings, principal: Principal, lifetime_s: int | None = None, now: float = NOW) -> str:
    file = ApiKeyFile(*settings.api_key_paths())
    return file.add(lambda pepper: make_key(principal, pepper, now=now, lifetime_s=lifetime_s))


@pytest.fixture
def keys(settings: Settings) -> dict[str, str]:
    """An API key of each scope, one with all of them, one that has ended; made before the gateway starts."""
    made = {scope: api_key(settings, Principal("script", scopes=frozenset({scope}))) for scope in SCOPES}
    everything = Principal("script", scopes=frozenset(SCOPES))
    ended = api_key(settings, everything, 60, NOW - 61)
    return {**made, "all": api_key(settings, everything), "ended": ended}


@pytest.fixture
async def gateway(make_gateway: MakeGateway, keys: dict[str, str]) -> AsyncIterator[GatewayUnderTest]:
    async with make_gateway(auth_failures_per_min=10_000, rate_limit=1_000_000) as gateway:
        yield gateway


def strangers(gateway: GatewayUnderTest, keys: dict[str, str]) -> dict[str, dict[str, str]]:
    """Headers of those whom no route but the public ones knows."""
    token = gateway.token("predict ops admin features")
    elsewhere = {"subject": "x", "scopes": SCOPES, "lifetime_s": 60, "now": NOW}
    secret = gateway.settings.signing_secret()
    return {
        "nobody": {},
        "a broken token": {"Authorization": f"Bearer {token[:-4]}AAAA"},
        "an expired token": bearer(
            mint_token(secret, issuer="sluice", audience="sluice", **{**elsewhere, "now": NOW - 90})
        ),
        "another audience": bearer(mint_token(secret, issuer="sluice", audience="other", **elsewhere)),
        "another issuer": bearer(mint_token(secret, issuer="other", audience="sluice", **elsewhere)),
        "another secret": bearer(mint_token(b"x" * 40, issuer="sluice", audience="sluice", **elsewhere)),
        "another scheme": {"Authorization": f"Basic {token}"},
        "a token elsewhere": {"X-Api-Key": token, "Cookie": f"token={token}"},
        "a made-up API key": bearer("gk_aaaaaaaa_" + "A" * 43),
        "an API key that has ended": bearer(keys["ended"]),
    }


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


async def ask(gateway: GatewayUnderTest, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    path = path.replace("{model}", "cnn_lstm").replace("{version}", "1")
    return await gateway.client.request(method, path, headers=headers)


def opened_by(scopes: set[str]) -> set[tuple[str, str]]:
    return {route for route, needed in NEEDED.items() if needed in scopes}


def assert_every_route_was_asked(routes: Iterable[tuple[str, str]]) -> None:
    """Routes that a table forgot would pass every test that walks along it."""
    assert {path for _, path in routes} >= {"/ray-serve/predict", "/stats", "/metrics", "/rollout", "/v2"}
    assert len(NEEDED) >= 16


async def test_every_route_is_public_or_needs_one_scope(gateway: GatewayUnderTest) -> None:
    assert {(method, path) for method, path in routes_of(gateway) if path not in PUBLIC_PATHS} == set(NEEDED)
    assert {path for _, path in routes_of(gateway)} >= PUBLIC_PATHS


async def test_public_routes_answer_anybody(gateway: GatewayUnderTest, keys: dict[str, str]) -> None:
    routes = [(method, path) for method, path in routes_of(gateway) if path in PUBLIC_PATHS]
    statuses = {
        (path, who): (await ask(gateway, method, path, headers)).status_code
        for method, path in routes
        for who, headers in strangers(gateway, keys).items()
    }
    assert {path for path, _ in statuses} == PUBLIC_PATHS
    assert "nobody" in {who for _, who in statuses}
    assert {question: status for question, status in statuses.items() if status not in {200, 503}} == {}


async def test_no_other_route_answers_a_stranger(gateway: GatewayUnderTest, keys: dict[str, str]) -> None:
    asked = set()
    for method, path in NEEDED:
        for who, headers in strangers(gateway, keys).items():
            response = await ask(gateway, method, path, headers)
            assert response.status_code == 401, (path, who)
            assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
            asked.add((method, path, who))
    assert_every_route_was_asked((method, path) for method, path, _ in asked)
    assert len({who for *_, who in asked}) >= 10


@pytest.mark.parametrize("scopes", COMBINATIONS, ids=lambda scopes: "+".join(sorted(scopes)) or "none")
async def test_a_token_opens_the_routes_of_its_scopes_and_no_other(gateway: GatewayUnderTest, scopes: set[str]) -> None:
    statuses = {
        (method, path): (await ask(gateway, method, path, gateway.bearer(" ".join(sorted(scopes))))).status_code
        for method, path in NEEDED
    }
    assert_every_route_was_asked(statuses)
    assert {route for route, status in statuses.items() if status != 403} == opened_by(scopes)
    assert 401 not in statuses.values()


async def test_an_api_key_opens_what_a_token_of_its_scopes_does(
    gateway: GatewayUnderTest, keys: dict[str, str]
) -> None:
    for name, scopes in (*((scope, {scope}) for scope in SCOPES), ("all", set(SCOPES))):
        statuses = {
            (method, path): (await ask(gateway, method, path, bearer(keys[name]))).status_code
            for method, path in NEEDED
        }
        assert_every_route_was_asked(statuses)
        assert {route for route, status in statuses.items() if status != 403} == opened_by(scopes), name
        assert 401 not in statuses.values()


@pytest.mark.parametrize("scopes", ["admin.x", "xpredict", "predictx", "predict.ops", "predict:ops", "o-ps"])
async def test_a_scope_that_only_looks_like_one_opens_nothing(gateway: GatewayUnderTest, scopes: str) -> None:
    statuses = {
        (method, path): (await ask(gateway, method, path, gateway.bearer(scopes))).status_code
        for method, path in NEEDED
    }
    assert_every_route_was_asked(statuses)
    assert set(statuses.values()) == {403}


async def test_metrics_open_by_setting_alone(make_gateway: MakeGateway) -> None:
    async with make_gateway(metrics_public=True) as gateway:
        assert (await gateway.client.get("/metrics")).status_code == 200
        assert (await gateway.client.get("/stats")).status_code == 401


MODEL_ROUTES = [(method, path) for method, path in NEEDED if "{model}" in path]


@pytest.mark.parametrize("by", ["token", "API key"])
async def test_a_model_outside_of_a_principal_s_list_does_not_exist_for_it(gateway: GatewayUnderTest, by: str) -> None:
    for models, exists in (({"cnn_lstm"}, True), ({"cnn_lstm", "other"}, True), ({"other"}, False), (set(), False)):
        headers = bearer(await credential_for(gateway, by, models))
        for method, path in MODEL_ROUTES:
            response = await ask(gateway, method, path, headers)
            assert (response.status_code == 404) is not exists, (path, models)
            unknown = await gateway.client.request(method, path.replace("{model}", "nobody_s"), headers=headers)
            assert unknown.status_code == 404
            assert exists or unknown.content == (await ask(gateway, method, path, headers)).content
        assert len(MODEL_ROUTES) >= 8
        stats = (await ask(gateway, "GET", "/v2/models/stats", headers)).json()["model_stats"]
        assert bool(stats) is exists
        predicted = await predict(gateway, headers)
        assert predicted.status_code == (200 if exists else 404)
        assert len(gateway.calls()) == (1 if exists else 0)
        gateway.ray_serve.calls.clear()


async def credential_for(gateway: GatewayUnderTest, by: str, models: set[str]) -> str:
    if by == "token":
        return mint_token(
            gateway.settings.signing_secret(),
            subject="desk",
            scopes=["predict"],
            issuer="sluice",
            audience="sluice",
            lifetime_s=600,
            now=NOW,
            models=models,
        )
    credential = api_key(gateway.settings, Principal("desk", None, frozenset({"predict"}), frozenset(models)))
    while (await ask(gateway, "GET", "/v2", bearer(credential))).status_code == 401:  # seen within a second
        pass
    return credential


async def predict(gateway: GatewayUnderTest, headers: dict[str, str]) -> httpx.Response:
    return await gateway.client.post(
        "/ray-serve/predict",
        content=some_windows(1).tobytes(),
        headers={"Content-Type": "application/octet-stream", **headers},
    )


async def test_failures_of_one_address_are_limited_on_every_route_together(make_gateway: MakeGateway) -> None:
    async with make_gateway() as gateway:
        statuses = []
        for n in range(14):
            method, path = list(NEEDED)[n]
            statuses.append((await ask(gateway, method, path, bearer("gk_aaaaaaaa_" + "A" * 43))).status_code)
        assert statuses == [401] * 10 + [429] * 4
        response = await ask(gateway, "GET", "/stats", bearer("x"))
        assert int(response.headers["retry-after"]) in range(1, 7)
        assert response.json()["type"] == "urn:sluice:problem:too-many-failures"
        assert (await predict(gateway, gateway.bearer())).status_code == 200
        stats = (await gateway.client.get("/stats", headers=gateway.bearer("ops"))).json()
        assert stats["auth_failures"] == {"api_key": 14, "malformed": 1}
        metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
        assert 'gateway_auth_failures_total{reason="api_key"} 14.0' in metrics


async def test_stats_show_which_keys_are_in_force(gateway: GatewayUnderTest, keys: dict[str, str]) -> None:
    stats = (await gateway.client.get("/stats", headers=gateway.bearer("ops"))).json()
    assert stats["keys"] == {"api_keys": {"keys": len(keys), "generation": 1, "failing": False}}


async def test_before_the_issuer_s_keys_are_known_tokens_are_503_and_api_keys_count(
    make_gateway: MakeGateway, keys: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"jwt_secret": None, "jwt_jwks_url": "http://127.0.0.1:9/keys"}
    token = mint_token(
        settings.signing_secret(),
        subject="x",
        scopes=["ops"],
        issuer="sluice",
        audience="sluice",
        lifetime_s=60,
        now=NOW,
    )
    async with make_gateway(**options) as gateway:
        response = await gateway.client.get("/stats", headers=bearer(token))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["type"] == "urn:sluice:problem:identity-unavailable"
        assert (await gateway.client.get("/stats", headers=bearer("nonsense"))).status_code == 401
        assert (await gateway.client.get("/health/live")).status_code == 200
        stats = await gateway.client.get("/stats", headers=bearer(keys["ops"]))
        assert stats.json()["keys"]["tokens"] == {"source": "url", "keys": 0, "generation": 0, "failing": True}
