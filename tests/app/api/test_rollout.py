from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.backends.fake import FakeBackend
from app.errors import PROBLEM_JSON
from app.rollout.state import StateAway, StateConflict, StateDoubtful, StateUnreadable
from tests.app.under_test import NOW, GatewayUnderTest, MakeGateway


async def test_the_share_moves_traffic_at_once_and_says_who_moved_it(gateway: GatewayUnderTest) -> None:
    assert (await gateway.predict()).headers["x-served-by"] == "ray_serve"
    response = await gateway.client.put(
        "/rollout", json={"ray_serve_fraction": 0.0}, headers=gateway.bearer("admin", subject="ann")
    )
    assert response.status_code == 200
    expected = {"ray_serve_fraction": 0.0, "changed_at": NOW, "changed_by": "ann"}
    assert expected.items() <= response.json().items()
    assert (await gateway.client.get("/rollout", headers=gateway.bearer("ops"))).json() == response.json()
    assert (await gateway.predict()).headers["x-served-by"] == "legacy"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"ray_serve_fraction": NaN}', 400),
        (b'{"ray_serve_fraction": 1.01}', 422),
        (b'{"ray_serve_fraction": -0.1}', 422),
        (b'{"ray_serve_fraction": "0.5"}', 422),
        (b'{"ray_serve_fraction": true}', 422),
        (b'{"ray_serve_fraction": null}', 422),
        (b'{"ray_serve_fraction": 1e999}', 400),
        (b'{"ray_serve_fraction": 0.1, "ray_serve_fraction": 0.2}', 400),
        (b'{"ray_serve_fraction": 0.1, "ray_serve_fr\\u0061ction": 0.2}', 400),
        (b'{"ray_serve_fraction": ' + b"[" * 9 + b"]" * 9 + b"}", 400),
        (b'\xef\xbb\xbf{"ray_serve_fraction": 0.5}', 400),
        (b"{}", 422),
        (b"[]", 422),
        (b'{"ray_serve_fraction": 0.5, "qx-mark": 1}', 422),
        (b"[" * 4000, 400),
        (b" " * 4097, 413),
    ],
)
async def test_a_bad_share_is_refused_and_changes_nothing(gateway: GatewayUnderTest, body: bytes, status: int) -> None:
    response = await gateway.client.put(
        "/rollout", content=body, headers={"Content-Type": "application/json", **gateway.bearer("admin")}
    )
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    assert len(response.content) <= 4096
    assert "qx-mark" not in response.text
    assert (await gateway.predict()).headers["x-served-by"] == "ray_serve"


async def test_a_share_of_another_type_is_415(gateway: GatewayUnderTest) -> None:
    response = await gateway.client.put("/rollout", content=b"0.5", headers=gateway.bearer("admin"))
    assert response.status_code == 415


@pytest.mark.parametrize("scopes", ["predict", "ops", "predict ops"])
async def test_only_administrators_set_the_share(gateway: GatewayUnderTest, scopes: str) -> None:
    response = await gateway.client.put("/rollout", json={"ray_serve_fraction": 0.0}, headers=gateway.bearer(scopes))
    assert response.status_code == 403


async def test_the_body_is_not_read_for_a_stranger(gateway: GatewayUnderTest) -> None:
    async def body() -> Any:
        raise AssertionError("the body was read")
        yield b""

    response = await gateway.client.put("/rollout", content=body(), headers={"Content-Type": "application/json"})
    assert response.status_code == 401


async def test_a_refused_method_is_told_every_method_of_the_path(gateway: GatewayUnderTest) -> None:
    response = await gateway.client.delete("/rollout")
    assert response.status_code == 405
    assert response.headers["Allow"] == "GET, PUT"


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (StateAway("qx-mark"), "nothing was changed"),
        (StateConflict(), "nothing was changed"),
        (StateDoubtful("qx-mark"), "may have been changed"),
        (StateUnreadable("qx-mark"), "could not be stored"),
        (OSError(28, "qx-mark"), "could not be stored"),
        (TimeoutError(110, "qx-mark"), "could not be stored"),
    ],
)
async def test_a_share_that_cannot_be_stored_is_503_and_says_what_became_of_it(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("app.rollout.rollout.Rollout.change", fail)
    response = await gateway.client.put(
        "/rollout", json={"ray_serve_fraction": 0.0}, headers=gateway.bearer("admin", subject="ann")
    )
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert detail in response.json()["detail"]
    assert "qx-mark" not in response.text


async def test_nobody_is_moved_back_to_a_backend_that_is_not_there(make_gateway: MakeGateway) -> None:
    async with make_gateway(backends=[FakeBackend("ray_serve")]) as gateway:
        admin = gateway.bearer("admin ops", subject="ann")
        for method, path, body in (
            ("PUT", "", {"ray_serve_fraction": 0.0}),
            ("POST", "/rollback", {}),
            ("POST", "/rollback", {"to": "legacy"}),
        ):
            response = await gateway.client.request(method, f"/rollout{path}", json=body, headers=admin)
            assert (response.status_code, "legacy is not configured" in response.text) == (409, True)
        shown = (await gateway.client.get("/rollout", headers=admin)).json()
        assert (shown["share"], shown["backends"]) == (1.0, ["ray_serve"])


async def test_a_promotion_of_a_step_that_was_left_already_is_refused(gateway: GatewayUnderTest) -> None:
    admin = gateway.bearer("admin ops", subject="ann")

    async def move(name: str, **body: object) -> httpx.Response:
        return await gateway.client.post(f"/rollout/{name}", json=body, headers=admin)

    await gateway.client.put("/rollout", json={"ray_serve_fraction": 0.0}, headers=admin)
    seen = (await move("start")).json()["epoch"]
    assert (await move("promote", epoch=seen)).json()["share"] == 0.05
    refused = await move("promote", epoch=seen)
    assert (refused.status_code, "moved on" in refused.text) == (409, True)
    assert (await move("promote")).json()["share"] == 0.25


async def test_who_changes_something_is_named_with_their_tenant(gateway: GatewayUnderTest) -> None:
    response = await gateway.client.put(
        "/rollout", json={"ray_serve_fraction": 0.5}, headers=gateway.bearer("admin", "s" * 255, tenant="t" * 255)
    )
    assert response.json()["changed_by"] == f"{'t' * 255}/{'s' * 255}"
