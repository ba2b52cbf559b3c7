"""What a plan does in a whole gateway beside moving callers: the shadow, the experiment, the webhook."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.contract import ReplicaLost
from tests.app.api.oip.test_routes import question
from tests.app.rollout.receiver import Receiver
from tests.app.under_test import GatewayUnderTest, MakeGateway, client_calls, some_windows

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs tests may be late; the shadow is to compare all the same."""
    monkeypatch.setattr("app.rollout.shadow.MAX_LAG_S", 60.0)


async def start(gateway: GatewayUnderTest, share: float, **plan: Any) -> None:
    """Begin a plan that stays at its only step."""
    steps = [{"share": share, "gate": "manual", "hold_s": 0, "samples": 0}]
    await put(gateway, ray_serve_fraction=0.0)
    response = await gateway.client.post(
        "/rollout/start",
        json={"plan": {"steps": steps, **plan}},
        headers=gateway.bearer("admin", subject="ann"),
    )
    assert response.status_code == 200, response.text


async def put(gateway: GatewayUnderTest, **wish: Any) -> None:
    response = await gateway.client.put("/rollout", json=wish, headers=gateway.bearer("admin"))
    assert response.status_code == 200, response.text


async def roll_back(gateway: GatewayUnderTest) -> None:
    response = await gateway.client.post("/rollout/rollback", json={}, headers=gateway.bearer("admin"))
    assert response.status_code == 200, response.text


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def shadowed(gateway: GatewayUnderTest) -> dict[str, float]:
    """Requests chosen for the shadow, by what became of them."""
    metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    lines = [line for line in metrics.splitlines() if line.startswith("gateway_shadow_requests_total{")]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def shown(gateway: GatewayUnderTest) -> tuple[float, dict[str, float]]:
    """The canary's share in the metrics, and each phase."""
    metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    samples = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("gateway_rollout_"))
    share = float(samples.pop("gateway_rollout_share"))
    return share, {name.split('"')[1]: float(value) for name, value in samples.items()}


def asked_both(gateway: GatewayUnderTest, response: httpx.Response) -> bool:
    request_id = response.headers["x-request-id"]
    return all(
        request_id in [call.request_id for call in client_calls(backend)]
        for backend in (gateway.ray_serve, gateway.legacy)
    )


async def test_each_answered_request_goes_to_the_other_arm_too(gateway: GatewayUnderTest) -> None:
    windows = some_windows(3)
    await put(gateway, ray_serve_fraction=0.0)
    plain = await gateway.predict(windows)
    await start(gateway, 0.5, shadow=1.0, guards=[{"signal": "disagreement", "ratio": 0, "slack": 0.1}])
    answers = [await gateway.predict(windows, subject=f"desk-{i}") for i in range(20)]
    await until(lambda: all(asked_both(gateway, answer) for answer in answers))
    assert {answer.headers["x-served-by"] for answer in answers} == {"legacy", "ray_serve"}
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.json()["predictions"] == plain.json()["predictions"] for answer in answers)
    assert await shadowed(gateway) == {"compared": 20.0}


async def test_what_the_shadow_compared_is_evidence_of_the_plan(gateway: GatewayUnderTest) -> None:
    await start(gateway, 0.5, shadow=1.0, guards=[{"signal": "disagreement", "ratio": 0, "slack": 0.1}])
    async with asyncio.timeout(10):
        while True:
            await gateway.predict(some_windows(4))
            gateway.wall_clock.advance(2.0)  # what was judged is kept once a second
            judgement = (await gateway.client.get("/rollout", headers=gateway.bearer("ops"))).json()["judgement"]
            if judgement is not None and judgement["guards"][0]["canary"] > 0:
                break
            await asyncio.sleep(0.05)
    assert judgement["guards"][0]["canary"] % 4 == 0
    assert judgement["guards"][0]["canary_bad"] == 0


async def test_nobody_waits_for_the_shadow(gateway: GatewayUnderTest) -> None:
    await start(gateway, 1.0, shadow=1.0)
    gateway.legacy.gate.clear()
    async with asyncio.timeout(1.5):  # the shadow itself waits for two seconds
        answer = await gateway.predict()
    assert (answer.status_code, answer.headers["x-served-by"]) == (200, "ray_serve")
    await until(lambda: asked_both(gateway, answer))
    gateway.legacy.gate.set()


async def test_a_caller_who_fell_back_is_not_compared(gateway: GatewayUnderTest) -> None:
    await start(gateway, 1.0, shadow=1.0)
    gateway.ray_serve.error = ReplicaLost()
    answer = await gateway.predict()
    assert (answer.headers["x-served-by"], answer.headers["x-fallback"]) == ("legacy", "replica-lost")
    assert await shadowed(gateway) == {"fallback": 1.0}


async def test_who_chose_a_backend_or_a_version_is_not_compared(gateway: GatewayUnderTest) -> None:
    await start(gateway, 1.0, shadow=1.0, experiment=True, canary={"backend": "ray_serve", "version": "1"})
    to_backend = await gateway.predict(scopes="predict ops", headers={"X-Route-To": "ray_serve"})
    to_version = await gateway.client.post(
        "/v2/models/cnn_lstm/versions/1/infer", json=question(), headers=gateway.bearer()
    )
    assert (to_backend.status_code, to_version.status_code) == (200, 200)
    assert len(client_calls(gateway.ray_serve)) == 2
    assert await shadowed(gateway) == {}


@pytest.mark.parametrize("outcome", ["killed", "leaving"])
async def test_what_waits_for_the_shadow_is_left_out_when_it_must_end(gateway: GatewayUnderTest, outcome: str) -> None:
    await start(gateway, 1.0, shadow=1.0)
    gateway.legacy.gate.clear()
    under_way = await gateway.predict()
    await until(lambda: asked_both(gateway, under_way))
    waiting = await gateway.predict()
    if outcome == "killed":
        kill = {"scope": "global", "reason": "halted"}
        assert (await gateway.client.put("/kill", json=kill, headers=gateway.bearer("admin"))).status_code == 200
    else:
        gateway.app.state.gateway.drain.begin()
    gateway.legacy.gate.set()
    async with asyncio.timeout(10):
        while await shadowed(gateway) != {"compared": 1.0, outcome: 1.0}:
            await asyncio.sleep(0.01)
    assert not asked_both(gateway, waiting)


async def test_the_shadow_rests_while_the_event_loop_is_late(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.rollout.shadow.MAX_LAG_S", 0.05)
    await start(gateway, 1.0, shadow=1.0)
    async with asyncio.timeout(10):
        while "lag" not in await shadowed(gateway):
            time.sleep(0.3)  # the very fault
            await gateway.predict()


async def test_the_shadow_ends_with_its_plan(gateway: GatewayUnderTest) -> None:
    await start(gateway, 1.0, shadow=1.0, experiment=True)
    assert gateway.app.state.gateway.trial.is_on
    await roll_back(gateway)
    assert not gateway.app.state.gateway.trial.is_on
    await gateway.predict()
    assert await shadowed(gateway) == {}
    assert await labelled(gateway, await gateway.predict()) == {"accepted": 0, "unknown": 1, "duplicate": 0}


async def labelled(gateway: GatewayUnderTest, answer: httpx.Response) -> dict[str, int]:
    """What comes of telling the outcome of an answer's first window."""
    gateway.app.state.gateway.experiment.write()  # as its thread does four times a second
    outcome = {"request_id": answer.headers["x-request-id"], "window": 0, "class": 0}
    response = await gateway.client.post("/rollout/outcomes", json=[outcome], headers=gateway.bearer("admin"))
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_share_and_phase_are_shown_from_the_start_and_whenever_they_change(make_gateway: MakeGateway) -> None:
    phases = dict.fromkeys(("running", "waiting", "paused", "done", "rolled_back", "stopped"), 0.0)
    async with make_gateway(ray_serve_fraction=0.5) as gateway:
        assert await shown(gateway) == (0.5, phases)
        await start(gateway, 0.25)
        await until(lambda: gateway.app.state.gateway.rollout.record.run.phase == "waiting")
        assert await shown(gateway) == (0.25, {**phases, "waiting": 1.0})
        await roll_back(gateway)
        assert await shown(gateway) == (0.0, {**phases, "rolled_back": 1.0})


async def test_outcomes_of_what_was_answered_in_an_experiment_can_be_told(gateway: GatewayUnderTest) -> None:
    await start(gateway, 1.0, experiment=True)
    answer = await gateway.predict(headers={"X-Symbol": "MSFT"})
    gateway.ray_serve.error = ReplicaLost()
    fallen_back = await gateway.predict()
    for of in (answer, fallen_back):
        assert await labelled(gateway, of) == {"accepted": 1, "unknown": 0, "duplicate": 0}
    report = (await gateway.client.get("/rollout/report", headers=gateway.bearer("ops"))).json()
    arms = {(arm["side"], arm["arm"]): arm["measures"]["labelled"] for arm in report["arms"]}
    assert arms == {("canary", "ray_serve@1"): 1, ("canary", "legacy@1"): 1}
    assert await shadowed(gateway) == {}


async def test_every_change_is_told_to_the_webhook_and_signed(make_gateway: MakeGateway, tmp_path: Path) -> None:
    (secret := tmp_path / "webhook.secret").write_bytes(b"whsec_" + base64.b64encode(KEY))
    secret.chmod(0o600)
    async with (
        Receiver(204) as receiver,
        make_gateway(webhook_url=receiver.url, webhook_secret_file=str(secret)) as gateway,
    ):
        await start(gateway, 0.25)
        kill = {"scope": "symbol", "name": "MSFT", "reason": "halted"}
        assert (await gateway.client.put("/kill", json=kill, headers=gateway.bearer("admin"))).status_code == 200
        await until(lambda: len(receiver.requests) == 3)
        metrics = (await gateway.client.get("/metrics", headers=gateway.bearer("ops"))).text
    assert 'gateway_webhook_events_total{outcome="delivered"} 3.0' in metrics
    for headers, body in receiver.requests:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
    share, started, killed = (json.loads(body) for _, body in receiver.requests)
    assert [event["type"] for event in (share, started, killed)] == ["rollout.share", "rollout.start", "kill.kill"]
    assert started["data"]["who"] == "ann"
    assert (started["data"]["before"]["share"], started["data"]["after"]["share"]) == (0.0, 0.25)
    assert killed["data"]["name"] == "MSFT"
