from __future__ import annotations

from benchmarks.rollout_judge.study import Kept
from benchmarks.rollout_judge.traffic import Behaviour, World


def of(world: World) -> Kept:
    return Kept("", lambda rng: world.draw, runs=1)


def test_a_sound_canary_is_led_through_the_whole_plan_and_a_bad_one_back() -> None:
    assert of(World()).run(7) == {"judge": False}
    assert of(World(canary=Behaviour(errors=0.2))).run(7) == {"judge": True}
