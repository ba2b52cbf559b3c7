from __future__ import annotations

from typing import Any

import pytest

from app.errors import PROBLEM_JSON
from app.rollout.state import StateAway, StateConflict, StateDoubtful, StateUnreadable
from tests.app.under_test import NOW, GatewayUnderTest


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
