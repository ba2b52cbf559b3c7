from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from app.backends.base import Answer, Call
from app.rollout.audit import verify
from app.settings import Settings
from tests.app.under_test import NOW, GatewayUnderTest, MakeGateway, some_windows


async def kill(gateway: GatewayUnderTest, scope: str, name: str = "", **more: Any) -> dict[str, Any]:
    body = {"scope": scope, "name": name, "reason": "qx-reason", **more}
    response = await gateway.client.put("/kill", json=body, headers=gateway.bearer("admin", subject="ann"))
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.mark.parametrize(
    ("scope", "name", "hit", "spared"),
    [
        ("global", "", {}, None),
        ("model", "cnn_lstm", {}, None),
        ("principal", "sub:qx-eve", {"subject": "qx-eve"}, {"subject": "desk-7"}),
        ("symbol", "MSFT", {"headers": {"X-Symbol": "MSFT"}}, {"headers": {"X-Symbol": "AAPL"}}),
        ("symbol", "MSFT", {"headers": {"X-Symbol": "MSFT"}}, {}),
        ("model", "other", None, {}),
        ("principal", "tenant:desk-7", None, {}),
    ],
)
async def test_what_is_killed_is_refused_and_nothing_else(
    gateway: GatewayUnderTest, scope: str, name: str, hit: dict[str, Any] | None, spared: dict[str, Any] | None
) -> None:
    await kill(gateway, scope, name)
    if hit is not None:
        refused = await gateway.predict(**hit)
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:sluice:problem:killed")
        assert refused.json()["scope"] == scope
        assert int(refused.headers["retry-after"]) > 0
        assert "qx-reason" not in refused.text
        assert not gateway.calls()  # neither the arm nor its fallback
    if spared is not None:
        assert (await gateway.predict(**spared)).status_code == 200


async def test_a_tenants_kill_holds_for_all_of_its_subjects(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "principal", "tenant:fund")
    for subject, tenant, status in (("a", "fund", 503), ("b", "fund", 503), ("a", "bank", 200), ("fund", None, 200)):
        headers = {"Content-Type": "application/octet-stream", **gateway.bearer("predict", subject, tenant)}
        response = await gateway.client.post("/ray-serve/predict", content=some_windows(1).tobytes(), headers=headers)
        assert response.status_code == status


async def test_one_subject_of_a_tenant_is_killed_and_its_colleagues_are_not(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "principal", "sub:fund/a")
    for subject, tenant, status in (("a", "fund", 503), ("b", "fund", 200), ("a", None, 200)):
        headers = {"Content-Type": "application/octet-stream", **gateway.bearer("predict", subject, tenant)}
        response = await gateway.client.post("/ray-serve/predict", content=some_windows(1).tobytes(), headers=headers)
        assert response.status_code == status


async def test_open_inference_says_it_in_its_own_form(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "global")
    response = await gateway.client.post("/v2/models/cnn_lstm/infer", content=b"{}", headers=gateway.bearer())
    assert response.status_code == 503
    assert response.json() == {"error": "predictions were stopped by an operator"}
    assert "retry-after" in response.headers


async def test_strangers_learn_nothing_of_a_kill(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "global")
    assert (await gateway.client.post("/ray-serve/predict", content=b"")).status_code == 401
    assert (await gateway.predict(scopes="ops")).status_code == 403


async def test_a_killed_request_spends_no_quota_and_its_body_is_not_read(make_gateway: MakeGateway) -> None:
    async def body() -> Any:
        raise AssertionError("the body was read")
        yield b""

    async with make_gateway(rate_limit=1) as gateway:
        await kill(gateway, "global")
        headers = {"Content-Type": "application/octet-stream", **gateway.bearer()}
        response = await gateway.client.post("/ray-serve/predict", content=body(), headers=headers)
        assert response.status_code == 503
        await kill(gateway, "global", killed=False)
        assert (await gateway.predict()).status_code == 200


async def test_a_lifted_kill_is_over_at_once(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "global")
    await kill(gateway, "global", killed=False)
    assert (await gateway.predict()).status_code == 200


async def test_an_answer_that_comes_after_the_kill_is_not_given(gateway: GatewayUnderTest) -> None:
    arrived, goes_on = asyncio.Event(), asyncio.Event()
    predict = gateway.ray_serve.predict

    async def wait(call: Call) -> Answer:
        arrived.set()
        await goes_on.wait()
        return await predict(call)

    gateway.ray_serve.predict = wait  # type: ignore[method-assign]
    for scope, name, status in (("symbol", "MSFT", 200), ("global", "", 503)):
        arrived.clear()
        goes_on.clear()
        asked = asyncio.create_task(gateway.predict())
        await arrived.wait()
        await kill(gateway, scope, name)
        goes_on.set()
        assert (await asked).status_code == status


@pytest.mark.parametrize("symbol", ["msft", "", "A" * 33, "MS FT", "MSFT\xe9", "MSFT,AAPL"])
async def test_a_symbol_that_can_be_none_is_refused(gateway: GatewayUnderTest, symbol: str) -> None:
    response = await gateway.predict(headers={"X-Symbol": symbol.encode("latin-1")})  # type: ignore[dict-item]
    assert response.status_code == 400


async def test_the_symbol_stands_in_the_access_log(gateway: GatewayUnderTest) -> None:
    await gateway.predict(headers={"X-Symbol": "BRK.B"})
    await asyncio.sleep(0.3)  # the log's thread
    assert [line["symbol"] for line in gateway.log_lines() if "symbol" in line] == ["BRK.B"]


async def test_who_killed_what_and_why_is_shown_to_operators(gateway: GatewayUnderTest) -> None:
    done = await kill(gateway, "principal", "sub:qx-eve")
    entry = {
        "scope": "principal",
        "name": "sub:qx-eve",
        "killed": True,
        "actor": "ann",
        "reason": "qx-reason",
        "at": NOW,
    }
    assert done == {"entry": entry, "reached": "this gateway", "kept": True}
    shown = await gateway.client.get("/kill", headers=gateway.bearer("ops"))
    assert shown.json() == {"killed": [entry], "lifted": [], "blind": False}
    await kill(gateway, "principal", "sub:qx-eve", killed=False)
    shown = await gateway.client.get("/kill", headers=gateway.bearer("ops"))
    assert (shown.json()["killed"], [lifted["name"] for lifted in shown.json()["lifted"]]) == ([], ["sub:qx-eve"])


async def test_kills_are_counted_by_scope_and_names_stay_out_of_the_metrics(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "principal", "sub:qx-eve")
    await gateway.predict(subject="qx-eve")
    metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    assert 'gateway_kills{scope="principal"} 1.0' in metrics
    assert 'gateway_killed_requests_total{scope="principal"} 1.0' in metrics
    assert 'error_type="killed"' in metrics
    assert "qx-eve" not in metrics
    stats = (await gateway.client.get("/stats", headers=gateway.bearer("ops"))).json()
    assert stats["kills"]["principal"] == 1


async def test_a_killed_gateway_is_alive_and_ready_to_refuse(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "global")
    for path in ("/health/live", "/health/ready", "/v2/health/ready"):
        assert (await gateway.client.get(path)).status_code == 200


async def test_a_kill_and_its_lift_are_in_the_audit_log(gateway: GatewayUnderTest) -> None:
    await kill(gateway, "global")
    await kill(gateway, "global", killed=False)
    path = gateway.settings.state_dir / "audit.jsonl"
    verify(path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["action"], record["who"], record["why"]) for record in records] == [
        ("kill", "ann", "qx-reason"),
        ("lift", "ann", "qx-reason"),
    ]
    metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    assert "gateway_audit_records 2.0" in metrics


async def test_a_kill_outlives_the_gateway(make_gateway: MakeGateway) -> None:
    async with make_gateway() as gateway:
        await kill(gateway, "global")
    async with make_gateway() as gateway:
        assert (await gateway.predict()).status_code == 503


async def test_a_gateway_that_cannot_tell_what_is_killed_refuses_everything(
    make_gateway: MakeGateway, settings: Settings
) -> None:
    settings.state_dir.mkdir(mode=0o700)
    path = settings.state_dir / "kill.json"
    path.write_text("{")
    async with make_gateway() as gateway:
        assert (await gateway.predict()).status_code == 503
        assert path.read_text() == "{"
        path.unlink()
        await asyncio.sleep(0.6)
        assert (await gateway.predict()).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{}", 422),
        (b'{"scope": "global"}', 422),
        (b'{"scope": "global", "reason": ""}', 422),
        (b'{"scope": "global", "reason": "a\\nb"}', 422),
        (b'{"scope": "global", "reason": "\\ud800"}', 400),
        (b'{"scope": "global", "name": "qx-mark", "reason": "x"}', 422),
        (b'{"scope": "everything", "reason": "x"}', 422),
        (b'{"scope": "model", "reason": "x"}', 422),
        (b'{"scope": "model", "name": "QX", "reason": "x"}', 422),
        (b'{"scope": "principal", "name": "eve", "reason": "x"}', 422),
        (b'{"scope": "principal", "name": "sub:", "reason": "x"}', 422),
        (b'{"scope": "symbol", "name": "msft", "reason": "x"}', 422),
        (b'{"scope": "global", "reason": "x", "killed": "no"}', 422),
        (b'{"scope": "global", "reason": "x", "qx-mark": 1}', 422),
        (b'{"scope": "global", "reason": "' + b"x" * 201 + b'"}', 422),
        (b"x" * 5000, 413),
    ],
)
async def test_a_bad_kill_is_refused_and_kills_nothing(gateway: GatewayUnderTest, body: bytes, status: int) -> None:
    response = await gateway.client.put(
        "/kill", content=body, headers={"Content-Type": "application/json", **gateway.bearer("admin")}
    )
    assert response.status_code == status, response.text
    assert "qx-mark" not in response.text
    assert (await gateway.predict()).status_code == 200


@pytest.mark.parametrize("scopes", ["predict", "ops", "predict ops"])
async def test_only_administrators_kill(gateway: GatewayUnderTest, scopes: str) -> None:
    body = {"scope": "global", "reason": "x"}
    assert (await gateway.client.put("/kill", json=body, headers=gateway.bearer(scopes))).status_code == 403


async def test_beyond_a_thousand_kills_there_is_still_the_global_one(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.rollout.kill.MAX_KILLS", 1)
    await kill(gateway, "symbol", "A")
    body = {"scope": "symbol", "name": "B", "reason": "x"}
    response = await gateway.client.put("/kill", json=body, headers=gateway.bearer("admin"))
    assert (response.status_code, response.json()["type"]) == (409, "urn:sluice:problem:conflict")
    await kill(gateway, "symbol", "A")
    await kill(gateway, "global")


async def test_a_disk_that_is_gone_keeps_no_kill_from_coming_into_force(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_gateway() as gateway:

        def refuse(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        (gateway.settings.state_dir / ".kill.json.spare").unlink(missing_ok=True)
        monkeypatch.setattr("app.rollout.kill_places.replace_file", refuse)
        monkeypatch.setattr("app.rollout.audit.os.fsync", lambda _: refuse(Path(), b""))
        done = await kill(gateway, "global")
        assert (done["reached"], done["kept"]) == ("this worker alone: the disk refused it", False)
        assert (await gateway.predict()).status_code == 503
        monkeypatch.undo()
        await asyncio.sleep(0.6)
        assert json.loads((gateway.settings.state_dir / "kill.json").read_text())["entries"]
