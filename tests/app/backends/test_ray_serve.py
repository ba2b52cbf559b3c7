"""The backend without a Ray: what it refuses, what it hands to its child, what it says before there is anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from app.backends.base import Call
from app.backends.coalesce import Group, Part
from app.backends.fake import fake_prediction
from app.backends.frames import Frame, Kind
from app.backends.ray_serve import BridgeProcess, RayServeBackend, _environment, _rejected, _result
from serve_app.contract import NotReady, Options, Prediction, ReplicaLost, ServingError

from .hand_driven import HandDrivenLoop, call, drive


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:6379"])
def test_an_address_of_rays_client_is_refused_with_the_reason(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        RayServeBackend(address)


def test_before_the_bridge_runs_calls_fail_at_once() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = RayServeBackend("127.0.0.1:1", clock=loop.time)
        assert (backend.status().ready, backend.status().reason) == (False, "no-bridge")
        with pytest.raises(NotReady):
            await backend.predict(call(1))
        assert (await backend.stats())["missing"] == {"cnn_lstm_predictor": "not-ready"}

    drive(scenario)


def test_the_bridge_gets_no_secret_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_JWT_SECRET", "canary")
    monkeypatch.setenv("REDIS_URL", "redis://:canary@host")
    monkeypatch.setenv("HTTPS_PROXY", "kept")
    environment = _environment({"RAY_AUTH_TOKEN_PATH": "/run/token"})
    assert "canary" not in str(environment)
    assert environment["HTTPS_PROXY"] == "kept"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_an_explicit_auth_mode_is_kept() -> None:
    assert _environment({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"


async def test_an_answer_with_an_unknown_code_is_still_a_serving_error() -> None:
    bridge = BridgeProcess("127.0.0.1:1", "app", {}, clock=lambda: 0.0)
    answer = bridge._expect(1)
    bridge._take(Frame(Kind.ERROR, 1, {"code": "from-the-future", "detail": "d"}, b""))
    with pytest.raises(ServingError):
        _result(await answer)


async def test_an_answer_nobody_waits_for_is_dropped() -> None:
    bridge = BridgeProcess("127.0.0.1:1", "app", {}, clock=lambda: 0.0)
    bridge._take(Frame(Kind.RESULT, 77, {}, b""))
    assert bridge._answers == {}


async def test_a_group_sent_after_the_connection_is_lost_fails_at_once() -> None:
    bridge = BridgeProcess("127.0.0.1:1", "app", {}, clock=lambda: 0.0)
    bridge._lose(None)
    group = Group(None, Options(), 1.0, ())
    with pytest.raises(ReplicaLost):
        await asyncio.wait_for(bridge.predict("app", group), 1.0)
    assert bridge._answers == {}


class JoinedBridge(BridgeProcess):
    """Joined to a cluster whose applications each answer with one version.

    Args:
        serves: Version by application.
    """

    def __init__(self, serves: dict[str, str | None]) -> None:
        super().__init__("127.0.0.1:1", "app", {}, clock=lambda: 0.0)
        self.state = "joined"
        self.serves = serves
        self.apps = {app: {"status": "RUNNING", "replicas": 1, "ready": True} for app in serves}
        self.asked: list[str] = []

    async def predict(self, app: str, group: Group) -> Prediction:
        self.asked.append(app)
        return fake_prediction(group.n_windows, version=self.serves[app])  # type: ignore[arg-type]


def backend_on(bridge: JoinedBridge, loop: HandDrivenLoop) -> RayServeBackend:
    backend = RayServeBackend("127.0.0.1:1", app_name="app", clock=loop.time)
    backend._bridge = bridge
    return backend


def test_what_the_default_application_serves_is_known_from_its_answers() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        bridge = JoinedBridge({"app": "1", "app-2": "2"})
        backend = backend_on(bridge, loop)
        assert backend.status().versions is None
        await backend.predict(call(1))
        assert backend.status().versions == {"1", "2"}
        bridge.serves["app"] = "3"
        await backend.predict(call(1))
        assert backend.status().versions == {"2", "3"}
        bridge.apps["app-2"]["ready"] = False
        assert backend.status().versions == {"3"}
        bridge.apps["app"]["ready"] = False
        assert backend.status().versions is None

    drive(scenario)


def test_a_version_is_answered_by_the_application_that_serves_it() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        bridge = JoinedBridge({"app": "1", "app-2": "2"})
        backend = backend_on(bridge, loop)
        for version in (None, "1", "2"):
            answer = await backend.predict(call(1, version=version))
            assert answer.prediction.model_version == (version or "1")
        assert bridge.asked == ["app", "app", "app-2"]
        with pytest.raises(NotReady):
            await backend.predict(call(1, version="99"))

    drive(scenario)


# --- a replica or the bridge is lost


class LossyBridge(JoinedBridge):
    """Loses the first groups that it is sent, and then answers.

    Args:
        losses: How many groups are lost.
        replicas: How many the application has.
    """

    def __init__(self, losses: int, *, replicas: int = 2) -> None:
        super().__init__({"app": "1"})
        self.losses = losses
        self.apps["app"]["replicas"] = replicas

    async def predict(self, app: str, group: Group) -> Prediction:
        answer = await super().predict(app, group)
        if len(self.asked) <= self.losses:
            raise ReplicaLost("the replica died before it answered")
        return answer


def part_of(one: Call) -> Part:
    return Part(one, one.windows, None)  # type: ignore[arg-type]  # nobody waits for it


async def outcome_of(backend: RayServeBackend, *, has_fallback: bool = False) -> str:
    try:
        await backend.predict(replace(call(1), has_fallback=has_fallback))
    except ServingError as error:
        return error.code
    return "ok"


def test_a_group_whose_replica_died_is_sent_once_more_and_not_twice() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        told: list[bool] = []
        for losses, outcome, sent in ((0, "ok", 1), (1, "ok", 2), (2, "replica-lost", 2)):
            bridge = LossyBridge(losses)
            backend = backend_on(bridge, loop)
            backend._on_retry = lambda *, is_made: told.append(is_made)
            assert await outcome_of(backend) == outcome
            assert len(bridge.asked) == sent
        assert told == [True, True]

    drive(scenario)


def test_an_outage_is_not_answered_with_twice_the_load() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        bridge = LossyBridge(10**6)
        backend = backend_on(bridge, loop)
        for _ in range(200):
            await outcome_of(backend)
        assert len(bridge.asked) <= 200 + 20 + 10
        stats = backend._n_retries
        assert stats[True] + stats[False] == 200

    drive(scenario)


def test_what_is_sent_again_alone_after_the_model_failed_earns_no_retries() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        for is_repeat, granted in ((False, 10), (True, 0)):
            backend = backend_on(JoinedBridge({"app": "1"}), loop)
            while backend._retries.spend():
                pass
            for _ in range(105):
                await backend._send("app", replace(Group.of((part_of(call(1)),)), is_repeat=is_repeat))
            assert sum(backend._retries.spend() for _ in range(20)) == granted

    drive(scenario)


def test_where_legacy_answers_the_only_replicas_successor_is_not_waited_for() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        for replicas, has_fallback, sent in ((1, True, 1), (1, False, 2), (2, True, 2)):
            bridge = LossyBridge(1, replicas=replicas)
            await outcome_of(backend_on(bridge, loop), has_fallback=has_fallback)
            assert len(bridge.asked) == sent

    drive(scenario)


def end_bridge(backend: RayServeBackend) -> None:
    assert backend._bridge is not None
    backend._bridge._lose(None)
    backend._bridge = None


class EndingBridge(JoinedBridge):
    """Ends with the first group."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__({"app": "1"})
        self._end = end

    async def predict(self, app: str, group: Group) -> Prediction:
        self._end()
        raise ReplicaLost("the bridge to Ray ended")


@pytest.mark.parametrize(("start_s", "outcome"), [(0.5, "ok"), (5.0, "replica-lost")])
def test_the_next_bridge_is_waited_for_if_it_may_come_in_time(start_s: float, outcome: str) -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = RayServeBackend("127.0.0.1:1", app_name="app", clock=loop.time)
        backend._bridge = EndingBridge(lambda: end_bridge(backend))
        backend._start_s = start_s
        asking = asyncio.ensure_future(outcome_of(backend))
        await loop.settle()
        assert asking.done() is (outcome != "ok")
        backend._bridge = JoinedBridge({"app": "1"})
        await loop.advance(0.1)
        assert await asking == outcome

    drive(scenario)


def test_where_legacy_answers_the_next_bridge_is_not_waited_for() -> None:
    async def scenario(loop: HandDrivenLoop) -> None:
        backend = RayServeBackend("127.0.0.1:1", app_name="app", clock=loop.time)
        backend._bridge = EndingBridge(lambda: end_bridge(backend))
        backend._start_s = 0.5
        asking = asyncio.ensure_future(outcome_of(backend, has_fallback=True))
        await loop.settle()
        assert asking.done()
        assert await asking == "replica-lost"

    drive(scenario)


def test_what_replicas_refused_is_told_with_how_many_did() -> None:
    refused = {"model": "cnn_lstm", "version": "9", "reason": "no safetensors file"}
    rows = [{"app": "app", "rejected": refused}, {"app": "app", "rejected": refused}, {"app": "app", "rejected": None}]
    assert _rejected(rows) == [{"app": "app", **refused, "replicas": 2}]
    assert _rejected([{"app": "app"}]) == []


def test_supervision_outlives_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(bridge: BridgeProcess) -> int:
        raise RuntimeError("nobody foresaw this")

    async def scenario(loop: HandDrivenLoop) -> None:
        monkeypatch.setattr(BridgeProcess, "live", fail)
        backend = RayServeBackend("127.0.0.1:1", clock=loop.time)
        await backend.start()
        for _ in range(5):
            await loop.advance(3.0)
        assert backend._starts > 2
        await backend.stop()

    drive(scenario)


def test_a_user_without_a_home_gets_a_bridge_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert _environment({"NAME": "value"})["NAME"] == "value"
