from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from app.rollout.evidence import LATENCY_BOUNDS_S, Evidence
from app.rollout.judge import Judge
from app.rollout.plan import Guard
from benchmarks.rollout_judge.study import GUARDS, SHADOW_GUARDS, Kept
from benchmarks.rollout_judge.traffic import Behaviour, World, faulty, lognormal_buckets, paired_classes

ALPHA = 0.01


def _outcomes_until_breach(judge: Judge, world: World, share: float, counted: str = "canary_requests") -> int | None:
    rng, n = np.random.default_rng(3), 0
    for _ in range(200):
        batch = world.draw(rng, share, 2.0)
        judge.see(batch)
        n += batch[counted]
        if judge.breached:
            return n
    return None


def test_expected_returns_too_far_apart_breach_their_guard_and_windows_without_them_do_not_count() -> None:
    judge = Judge((Guard(signal="regression", ratio=0, slack=0.01),), ALPHA)
    judge.see(Evidence({"shadow_windows": 1000}))
    assert not judge.verdicts()[0].is_known
    judge.see(Evidence({"shadow_windows": 200, "shadow_gaps": 200, "shadow_outside_interval": 1}))
    assert (judge.breached, judge.verdicts()[0].is_known) == (False, True)
    judge.see(Evidence({"shadow_windows": 200, "shadow_gaps": 200, "shadow_outside_interval": 30}))
    assert judge.breached
    assert "31 of 400" in judge.verdicts()[0].sentence


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(World(), id="the same arms"),
        pytest.param(faulty(errors=0.012), id="errors as the guard just allows"),
        pytest.param(faulty(errors=0.009, invalid=0.001), id="invalid outputs as the guard just allows"),
    ],
)
def test_of_300_rollouts_that_keep_every_guard_hardly_any_is_ended(world: World) -> None:
    study = Kept("", lambda rng: world.draw, runs=100, look_s=10.0)
    ended = sum(study.run(seed)["judge"] for seed in range(100))
    assert ended <= 4  # of 100 at 1 %, five come by chance once in 300 times


@pytest.mark.parametrize(
    ("signal", "world", "most"),
    [
        ("errors", faulty(errors=0.03), 5000),
        ("slow", faulty(latency=lognormal_buckets(0.030)), 5000),
        ("invalid", faulty(invalid=0.01), 5000),
        ("errors", faulty(errors=1.0), 200),
    ],
)
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_fault_breaches_its_guard_within_few_requests(signal: str, world: World, most: int, share: float) -> None:
    judge = Judge(GUARDS, ALPHA)
    n = _outcomes_until_breach(judge, world, share)
    assert n is not None
    assert n <= most + 800  # requests of the look in which it was found
    assert signal in {verdict.signal for verdict in judge.verdicts() if verdict.breached}


def test_a_class_chosen_too_often_is_found_in_the_shadow() -> None:
    guards = (Guard(signal="class_mix", ratio=1.0, slack=0.02),)
    biased = World(classes=paired_classes(0.9, 0.1), shadow=0.1)
    judge = Judge(guards, ALPHA)
    assert _outcomes_until_breach(judge, biased, 0.05, "shadow_windows") is not None
    [verdict] = judge.verdicts()
    assert verdict.looked_at == "were of class 2"
    assert _outcomes_until_breach(Judge(SHADOW_GUARDS, ALPHA), World(shadow=0.1), 0.05, "shadow_windows") is None


def test_a_fault_that_shows_at_full_share_is_judged_by_what_the_stable_arm_did_before() -> None:
    rng, judge = np.random.default_rng(4), Judge(GUARDS, ALPHA)
    for _ in range(30):
        judge.see(World().draw(rng, 0.5, 2.0))
    assert not judge.breached
    assert _outcomes_until_breach(judge, faulty(errors=0.05), 1.0) is not None
    slow = faulty(latency=lognormal_buckets(0.040))
    judge = Judge(GUARDS, ALPHA)
    for _ in range(30):
        judge.see(World().draw(rng, 0.5, 2.0))
    assert _outcomes_until_breach(judge, slow, 1.0) is not None


@pytest.mark.parametrize("looks", [0, 1, 40])
def test_another_judge_goes_on_exactly_where_one_ended(looks: int) -> None:
    guards = (*GUARDS, *SHADOW_GUARDS)
    rng, world = np.random.default_rng(5), World(canary=Behaviour(errors=0.02), shadow=0.1)
    one = Judge(guards, ALPHA)
    for _ in range(looks):
        one.see(world.draw(rng, 0.1, 0.3))
    other = Judge.from_document(guards, ALPHA, json.loads(json.dumps(one.to_document())))
    for _ in range(20):
        batch = world.draw(rng, 0.1, 0.3)
        one.see(batch)
        other.see(batch)
    assert other.to_document() == one.to_document()
    assert other.verdicts() == one.verdicts()


def test_a_document_of_other_guards_is_refused() -> None:
    document = Judge(GUARDS[:1], ALPHA).to_document()
    with pytest.raises(KeyError):
        Judge.from_document(GUARDS, ALPHA, document)


def test_a_breach_stays_a_breach() -> None:
    guards = (Guard(signal="invalid", ratio=0, slack=0.001),)
    judge = Judge(guards, ALPHA)
    judge.see(Evidence({"canary_requests": 10, "canary_errors": 10, "canary_invalid": 10}))
    assert judge.breached
    judge.see(Evidence({"canary_requests": 100_000}))
    [verdict] = judge.verdicts()
    assert verdict.log10_evidence < verdict.log10_threshold
    assert verdict.breached


def test_a_canary_as_slow_as_is_forgiven_keeps_its_guard_and_one_beyond_does_not() -> None:
    def answered(canary_s: float, guard: Guard) -> bool:
        judge, batch = Judge((guard,), ALPHA), Evidence()
        for i in range(300):
            batch.count_answer("stable", 0.001 * (10 + i % 10))
            batch.count_answer("canary", 0.001 * (10 + i % 10) + canary_s)
        for _ in range(5):
            judge.see(batch)
        return judge.breached

    forgiving = partial(Guard, signal="slow", ratio=1.25, slack=0.01)
    assert not answered(0.004, forgiving(allowance_s=0.006))
    assert answered(0.004, forgiving())
    assert not answered(0.008, forgiving(stretch=2.0))
    assert answered(0.030, forgiving(stretch=2.0, allowance_s=0.006))


def test_verdicts_say_what_was_counted_in_words() -> None:
    judge = Judge(GUARDS, ALPHA)
    assert judge.verdicts()[0].sentence == "The canary has answered nothing yet."
    counts = {"stable_requests": 1000, "stable_errors": 10, "canary_requests": 100, "canary_errors": 3}
    judge.see(Evidence(counts | {"stable_latency_3": 990, "canary_latency_3": 97}))
    judge.see(Evidence(counts | {"stable_latency_3": 990, "canary_latency_3": 97}))
    errors = judge.verdicts()[0]
    assert errors.sentence == (
        "6 of 200 (3 %) of the canary's answers failed, 20 of 2000 (1 %) of the stable arm's; 1.2 % would be allowed: "
        "no breach is shown."
    )
    assert f"{1000 * LATENCY_BOUNDS_S[3]:.3g} ms" in judge.verdicts()[2].sentence


def test_until_the_stable_arms_latency_is_known_the_guard_says_that_it_waits_for_that() -> None:
    judge = Judge((Guard(signal="slow", ratio=1.25),), ALPHA)
    judge.see(Evidence({"stable_latency_3": 150, "canary_latency_3": 500}))
    assert judge.verdicts()[0].sentence == "The stable arm has not yet answered enough to compare with."
    for _ in range(2):  # the first are learned from, the next are compared with
        judge.see(Evidence({"stable_latency_3": 50}))
    assert judge.verdicts()[0].sentence.startswith("0 of 500")


def test_a_plan_without_guards_is_never_breached() -> None:
    judge = Judge((), ALPHA)
    judge.see(Evidence({"canary_requests": 10, "canary_errors": 10}))
    assert not judge.breached
    assert judge.verdicts() == []
