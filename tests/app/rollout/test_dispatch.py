import asyncio
from dataclasses import replace

import numpy as np
import pytest

from app.backends.base import Answer, Arm, Call
from app.backends.fake import FakeBackend
from app.rollout.dispatch import Dispatcher, Served
from app.rollout.evidence import Evidence
from app.rollout.plan import ArmName
from app.rollout.record import Record
from serve_app.contract import (
    ERRORS_BY_CODE,
    ModelNotFound,
    ModelOutputInvalid,
    NotReady,
    Options,
    ReplicaLost,
)

FINAL = {"invalid-windows", "overloaded"}


class Rig:
    """Both arms, a share and a clock that stands still at 100 s."""

    def __init__(self, *names: str) -> None:
        self.ray, self.legacy = FakeBackend("ray_serve"), FakeBackend("legacy")
        self.fraction = 1.0
        arms = [arm for arm in (self.ray, self.legacy) if not names or arm.name in names]
        self.evidence = Evidence()
        self.stable, self.canary = ArmName(backend="legacy"), ArmName(backend="ray_serve")
        self.overrides: dict[str, float] = {}
        self.now = 100.0
        self.dispatcher = Dispatcher(
            arms, record=self.record, sticky_key=b"k" * 32, witness=self.evidence, clock=lambda: self.now
        )

    def record(self) -> Record:
        return Record(
            share=self.fraction,
            stable=self.stable,
            canary=self.canary,
            overrides=self.overrides,
            changed_at=0,
            changed_by="ann",
        )

    async def ask(self, subject: str = "desk", route_to: str | None = None, version: str | None = None) -> Served:
        windows = np.zeros((2, 50, 60), np.float32)
        call = Call(windows, Options(), 102.0, "request", "0" * 16, version=version)
        return await self.dispatcher.predict(call, subject=subject, route_to=route_to)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_the_share_decides_who_answers(rig: Rig) -> None:
    assert (await rig.ask()).arm == Arm("ray_serve")
    rig.fraction = 0.0
    assert (await rig.ask()).arm == Arm("legacy")


async def test_a_caller_stays_on_one_side(rig: Rig) -> None:
    rig.fraction = 0.5
    sides = {subject: {(await rig.ask(subject)).arm.backend for _ in range(5)} for subject in "abcdefghij"}
    assert all(len(side) == 1 for side in sides.values())
    assert {next(iter(side)) for side in sides.values()} == {"ray_serve", "legacy"}


@pytest.mark.parametrize("code", sorted(set(ERRORS_BY_CODE) - FINAL - {"model-not-found"}))
async def test_a_failure_on_ray_serve_is_answered_by_legacy_and_named(rig: Rig, code: str) -> None:
    rig.ray.error = ERRORS_BY_CODE[code]()
    served = await rig.ask()
    assert (served.arm, served.fallback) == (Arm("legacy"), code)


@pytest.mark.parametrize("code", sorted(FINAL))
async def test_bad_input_and_shedding_never_fall_back(rig: Rig, code: str) -> None:
    rig.ray.error = ERRORS_BY_CODE[code]()
    with pytest.raises(ERRORS_BY_CODE[code]):
        await rig.ask()
    assert not rig.legacy.calls


async def test_ray_serve_gets_seven_tenths_of_the_time_and_legacy_the_rest(rig: Rig) -> None:
    rig.ray.error = ReplicaLost()
    await rig.ask()
    assert rig.ray.calls[0].deadline == pytest.approx(101.4)
    assert rig.legacy.calls[0].deadline == 102.0
    assert [call.has_fallback for call in rig.ray.calls + rig.legacy.calls] == [True, False]


async def test_while_legacy_is_not_ready_the_whole_time_is_ray_serves(rig: Rig) -> None:
    rig.legacy.ready = False
    assert (await rig.ask()).arm == Arm("ray_serve")
    assert (rig.ray.calls[0].deadline, rig.ray.calls[0].has_fallback) == (102.0, False)


async def test_a_legacy_that_became_ready_meanwhile_answers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail_late(call: Call) -> Answer:
        rig.legacy.ready = True
        raise ReplicaLost

    rig.legacy.ready = False
    monkeypatch.setattr(rig.ray, "predict", fail_late)
    assert (await rig.ask()).arm == Arm("legacy")


@pytest.mark.parametrize(("names", "route_to"), [(("ray_serve",), None), ((), "ray_serve")])
async def test_without_a_fallback_the_whole_time_is_ray_serves(names: tuple[str, ...], route_to: str | None) -> None:
    rig = Rig(*names)
    rig.ray.error = ReplicaLost("gone")
    with pytest.raises(ReplicaLost):
        await rig.ask(route_to=route_to)
    assert (rig.ray.calls[0].deadline, rig.ray.calls[0].has_fallback) == (102.0, False)
    assert not rig.legacy.calls


async def test_legacy_does_not_fall_back_to_what_it_replaces(rig: Rig) -> None:
    rig.fraction = 0.0
    rig.legacy.error = NotReady()
    with pytest.raises(NotReady):
        await rig.ask()
    assert not rig.ray.calls


async def test_an_arm_alone_answers_everybody_whatever_the_share() -> None:
    rig = Rig("legacy")
    assert (await rig.ask()).arm == Arm("legacy")
    assert (await rig.ask()).fallback is None


async def test_an_arm_that_is_not_configured_cannot_be_chosen() -> None:
    with pytest.raises(NotReady):
        await Rig("legacy").ask(route_to="ray_serve")


async def test_an_answer_that_was_withheld_is_made_good_by_legacy(rig: Rig) -> None:
    rig.ray.error = ModelOutputInvalid("NaN")
    served = await rig.ask()
    assert (served.arm, served.fallback) == (Arm("legacy"), "model-output-invalid")
    with pytest.raises(ModelOutputInvalid):
        await rig.ask(route_to="ray_serve")


# --- a version that the caller names


async def test_an_arm_that_serves_the_version_answers_whatever_the_share(rig: Rig) -> None:
    rig.legacy.version = "4"
    assert (await rig.ask(version="4")).arm == Arm("legacy", "4")
    assert rig.legacy.calls[0].version == "4"
    assert not rig.ray.calls


async def test_where_both_arms_serve_the_version_the_share_decides(rig: Rig) -> None:
    assert (await rig.ask(version="1")).arm == Arm("ray_serve", "1")
    rig.fraction = 0.0
    assert (await rig.ask(version="1")).arm == Arm("legacy", "1")


async def test_legacy_makes_good_only_for_its_own_version(rig: Rig) -> None:
    rig.ray.error = ReplicaLost()
    served = await rig.ask(version="1")
    assert (served.arm, served.fallback) == (Arm("legacy", "1"), "replica-lost")
    rig.ray.version = "4"
    with pytest.raises(ReplicaLost):
        await rig.ask(version="4")
    assert [call.version for call in rig.legacy.calls] == ["1"]


async def test_a_version_that_nobody_serves_is_not_found_and_asks_nobody(rig: Rig) -> None:
    with pytest.raises(ModelNotFound):
        await rig.ask(version="99")
    assert not rig.ray.calls + rig.legacy.calls


async def test_an_operator_who_chooses_the_arm_may_have_it_load_another_version(rig: Rig) -> None:
    assert (await rig.ask(version="99", route_to="legacy")).arm == Arm("legacy", "99")
    assert rig.legacy.calls[0].version == "99"


async def test_while_an_arm_is_away_nobody_knows_what_it_will_serve(rig: Rig) -> None:
    rig.ray.ready = False
    with pytest.raises(NotReady):
        await rig.ask(version="99")
    assert (await rig.ask(version="1")).arm == Arm("legacy", "1")


async def test_an_answer_from_another_version_is_never_passed_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rig.ray.predict

    async def replaced(call: Call) -> Answer:
        answer = await honest(call)
        return replace(answer, prediction=replace(answer.prediction, model_version="2"))

    monkeypatch.setattr(rig.ray, "predict", replaced)
    served = await rig.ask(version="1")
    assert (served.arm, served.fallback) == (Arm("legacy", "1"), "unavailable")
    assert (await rig.ask()).answer.prediction.model_version == "2"


def test_the_versions_served_are_those_of_all_ready_arms(rig: Rig) -> None:
    rig.legacy.version = "4"
    assert rig.dispatcher.versions() == ["1", "4"]
    rig.ray.ready = False
    assert rig.dispatcher.versions() == ["4"]


async def test_an_arm_whose_version_is_gone_is_made_good(rig: Rig) -> None:
    rig.ray.error = ModelNotFound()
    assert (await rig.ask()).fallback == "unavailable"
    assert (await rig.ask(version="1")).fallback == "model-not-found"
    rig.legacy.error = ModelNotFound()
    with pytest.raises(ModelNotFound):
        await rig.ask(version="1")


async def test_two_versions_on_ray_serve_are_two_arms_and_legacy_answers_for_both(rig: Rig) -> None:
    rig.stable, rig.canary = (ArmName(backend="ray_serve", version=version) for version in ("1", "2"))
    rig.fraction = 1.0
    rig.ray.version = "2"
    assert (await rig.ask()).arm == Arm("ray_serve", "2")
    rig.fraction = 0.0
    rig.ray.version = "1"
    served = await rig.ask()
    assert (served.arm, served.side) == (Arm("ray_serve", "1"), "stable")
    rig.ray.error = ReplicaLost()
    assert (await rig.ask()).arm == Arm("legacy")


async def test_a_failing_canary_version_is_made_good_by_the_stable_one_on_the_same_backend(rig: Rig) -> None:
    rig.stable, rig.canary = (ArmName(backend="ray_serve", version=version) for version in ("1", "2"))
    rig.ray.errors = {"2": ReplicaLost()}
    served = await rig.ask()
    assert (served.arm, served.fallback, served.side) == (Arm("ray_serve", "1"), "replica-lost", "canary")


async def test_a_principal_or_a_tenant_may_have_a_share_of_its_own(rig: Rig) -> None:
    rig.fraction, rig.overrides = 0.0, {"sub:ann": 1.0, "tenant:acme": 1.0}
    call = Call(np.zeros((1, 50, 60), np.float32), Options(), 102.0, "request", "0" * 16)
    for accounts, arm in (
        (["sub:ann"], "ray_serve"),
        (["sub:ben", "tenant:acme"], "ray_serve"),
        (["sub:ben"], "legacy"),
    ):
        served = await rig.dispatcher.predict(call, subject="any", accounts=accounts)
        assert served.arm == Arm(arm)


async def test_what_comes_of_each_side_is_counted_and_what_chose_its_arm_is_not(rig: Rig) -> None:
    await rig.ask()
    await rig.ask(route_to="ray_serve")
    await rig.ask(version="1")
    rig.ray.error = ReplicaLost()
    await rig.ask()
    rig.ray.error = ERRORS_BY_CODE["model-output-invalid"]()
    await rig.ask()
    evidence = rig.evidence
    assert (evidence["canary_requests"], evidence["canary_errors"], evidence["canary_invalid"]) == (3, 2, 1)
    assert evidence["stable_requests"] == 0


async def test_a_caller_in_a_hurry_that_gives_up_tells_how_slow_the_arm_is_and_no_failure(rig: Rig) -> None:
    rig.ray.error = ERRORS_BY_CODE["deadline-exceeded"]()
    await rig.ask()
    assert (sum(rig.evidence.counts.values()), rig.evidence["canary_latency_0"]) == (1, 1)


@pytest.mark.parametrize(
    ("waited_s", "counted"),
    [(0.3, {"canary_latency_60": 1}), (3.0, {"canary_requests": 1, "canary_errors": 1})],
)
async def test_who_left_before_the_answer_waited_so_long_at_least(
    rig: Rig, waited_s: float, counted: dict[str, int]
) -> None:
    rig.ray.gate.clear()
    asked = asyncio.create_task(rig.ask())
    await asyncio.sleep(0)
    rig.now += waited_s
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert rig.evidence.counts == counted


async def test_a_plan_between_arms_that_are_not_configured_is_a_clear_refusal() -> None:
    rig = Rig("ray_serve")
    rig.stable, rig.canary = ArmName(backend="legacy", version="1"), ArmName(backend="legacy", version="2")
    with pytest.raises(NotReady):
        await rig.ask()


async def test_what_an_arm_did_late_is_no_evidence_of_the_one_that_followed_it(rig: Rig) -> None:
    rig.ray.gate.clear()
    asked = asyncio.create_task(rig.ask())
    await asyncio.sleep(0)
    rig.canary = ArmName(backend="ray_serve", version="5")
    rig.ray.gate.set()
    await asked
    assert rig.evidence.counts == {}
