"""What the bridge makes of what it sees, without a cluster: when it is stranded, and what an exception means."""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError

from app.backends import bridge
from app.backends.bridge import Cluster, Liveness, meaning
from app.backends.frames import Predict
from serve_app.contract import (
    DeadlineExceeded,
    ModelFailed,
    NotReady,
    Overloaded,
    ReplicaLost,
    ServingError,
)


def blind_from(now: float) -> Liveness:
    liveness = Liveness(now)
    liveness.saw_nothing(now)
    return liveness


def test_blind_and_unanswered_for_longer_than_two_probes_take_is_stranded() -> None:
    liveness = blind_from(100.0)
    assert liveness.verdict(111.9) is None
    assert liveness.verdict(112.0) is not None


def test_blind_while_replicas_answer_is_not_stranded() -> None:
    liveness = blind_from(100.0)
    liveness.answered(160.0)
    assert liveness.verdict(171.9) is None
    assert liveness.verdict(172.0) is not None


def test_seeing_again_forgives() -> None:
    liveness = blind_from(100.0)
    liveness.saw(1)
    liveness.saw_nothing(200.0)
    assert liveness.verdict(204.0) is None


def test_five_patient_calls_without_an_answer_for_ten_seconds_is_stranded() -> None:
    liveness = Liveness(100.0)
    for _ in range(4):
        liveness.unanswered(budget_s=2.0)
    assert liveness.verdict(120.0) is None
    liveness.unanswered(budget_s=2.0)
    assert liveness.verdict(109.0) is None
    assert liveness.verdict(110.0) is not None
    liveness.answered(110.0)
    assert liveness.verdict(130.0) is None


def test_silence_while_no_replica_runs_is_excused() -> None:
    liveness = Liveness(100.0)
    for _ in range(5):
        liveness.unanswered(budget_s=2.0)
    liveness.saw(0)
    assert liveness.verdict(120.0) is None


def test_callers_in_a_hurry_cannot_strand_it() -> None:
    liveness = Liveness(100.0)
    for _ in range(1000):
        liveness.unanswered(budget_s=0.001)
    assert liveness.verdict(200.0) is None


@pytest.mark.parametrize(
    ("raised", "means"),
    [
        (ActorDiedError(), ReplicaLost),
        (ActorUnavailableError("gone", None), ReplicaLost),
        (RequestCancelledError("r"), ReplicaLost),
        (AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata(), "secret"), ReplicaLost),
        (RuntimeError("Unexpected error (StatusCode.INTERNAL): secret."), ReplicaLost),
        (RuntimeError("secret"), ServingError),
        (TimeoutError(), DeadlineExceeded),
        (GetTimeoutError("late"), DeadlineExceeded),
        (BackPressureError(num_queued_requests=3, max_queued_requests=2), Overloaded),
        (DeploymentUnavailableError("d"), NotReady),
        (RayServeException("secret"), ServingError),
        (ValueError("secret"), ServingError),
        (RayError("secret"), ServingError),
    ],
)
def test_what_ray_raises_becomes_an_error_of_the_contract(raised: Exception, means: type[ServingError]) -> None:
    translated = meaning(raised)
    assert type(translated) is means
    assert "secret" not in translated.detail


def test_an_error_of_the_contract_keeps_code_and_detail_through_rays_wrapping() -> None:
    wrapped = RayTaskError("predict_packed", "traceback", ModelFailed("it raised")).as_instanceof_cause()
    translated = meaning(wrapped)
    assert (translated.code, translated.detail) == ("model-failed", "it raised")


# --- how many replicas there are


def application(status: str, **replica_states: int) -> SimpleNamespace:
    deployments = {"model": SimpleNamespace(replica_states=replica_states)} if replica_states else {}
    return SimpleNamespace(status=SimpleNamespace(value=status), deployments=deployments)


def look_at(cluster: Cluster, app: SimpleNamespace) -> int:
    replicas = cluster._running_in("app", app)
    cluster.states({"app": (app.status.value, replicas)})
    return replicas


async def test_while_an_application_is_built_anew_its_replicas_of_before_count() -> None:
    cluster = Cluster("app")
    assert look_at(cluster, application("DEPLOYING")) == 0
    assert look_at(cluster, application("RUNNING", RUNNING=2)) == 2
    assert look_at(cluster, application("DEPLOYING")) == 2
    assert look_at(cluster, application("DEPLOYING", RUNNING=1, STARTING=1)) == 1
    assert look_at(cluster, application("DEPLOYING", STARTING=2)) == 0


async def test_what_is_being_deleted_counts_no_more() -> None:
    cluster = Cluster("app")
    assert look_at(cluster, application("RUNNING", RUNNING=2)) == 2
    assert look_at(cluster, application("DELETING")) == 0


@pytest.mark.parametrize(("replicas_by_then", "answers"), [(2, True), (1, False)])
async def test_with_its_only_replica_lost_an_application_must_answer_a_first_call_again(
    monkeypatch: pytest.MonkeyPatch, replicas_by_then: int, answers: bool
) -> None:
    apps = {"app": application("RUNNING", RUNNING=1)}
    monkeypatch.setattr(bridge.serve, "status", lambda: SimpleNamespace(applications=apps))
    monkeypatch.setattr(bridge.serve, "get_app_handle", lambda name: object())
    monkeypatch.setattr(Cluster, "_make_first_call", AsyncMock())
    cluster = Cluster("app")
    cluster.states(cluster.look())
    begun_before = cluster.look()
    cluster._answering["app"] = object()
    cluster._lose_replica("app")
    cluster.states(begun_before)
    assert "app" in cluster._answering  # of before the loss, when there was one: another may have come since
    apps["app"] = application("RUNNING", RUNNING=replicas_by_then)
    cluster.states(cluster.look())
    assert ("app" in cluster._answering) is answers


async def test_a_replica_that_refuses_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(predict: Predict, windows: bytes) -> bytes:
        raise ModelFailed("the model failed on these windows")

    cluster = Cluster("app")
    cluster._answering["app"] = object()
    cluster.liveness = Liveness(0.0)
    monkeypatch.setattr(cluster, "_predict_once", refuse)
    predict = SimpleNamespace(app="app", deadline=time.monotonic() + 10)
    with pytest.raises(ModelFailed):
        await cluster.predict(predict, b"")  # type: ignore[arg-type]
    assert cluster.liveness._last_answer > 0.0
