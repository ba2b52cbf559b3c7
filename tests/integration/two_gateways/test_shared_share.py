"""Shares and plans over two real gateways, one of two workers, and a real Redis.

Both arms are the legacy backend, the canary with its version named: an arm of its own, judged like any other.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer
from tests.integration.two_gateways.gateways import PROMISED_S, WORKERS, Gateways, again_and_again

pytestmark = pytest.mark.integration

NOOP_VERSION = "0"
CALLERS = itertools.cycle(range(40))


def plan(*steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "stable": {"backend": "legacy"},
        "canary": {"backend": "legacy", "version": NOOP_VERSION},
        "steps": list(steps),
        "guards": [{"signal": "errors", "slack": 0.02}],
    }


@pytest.fixture(autouse=True)
def stable_arm(gateways: Gateways) -> Iterator[None]:
    """Nobody is on a canary before and after a test."""
    yield
    wait_until(lambda: gateways.say(gateways.one, "POST", "/rollout/rollback").status_code == 200, 20, "the way back")
    wait_until(lambda: everywhere(gateways, 0.0), 10, "everybody to be back")


def change(gateways: Gateways, gateway: GatewayProcess, method: str, path: str, **body: Any) -> None:
    response = gateways.say(gateway, method, path, **body)
    assert response.status_code == 200, response.text


def shares(gateways: Gateways, looks: int = 12) -> set[float]:
    """What the workers of both say, over a connection for each look."""
    return {gateways.rollout(gateways.named(name))["share"] for name in WORKERS for _ in range(looks)}


def everywhere(gateways: Gateways, share: float) -> bool:
    return shares(gateways) == {share}


def predict(gateways: Gateways, gateway: GatewayProcess) -> int:
    time.sleep(0.005)
    return gateways.ask(gateway, subject=f"desk-{next(CALLERS)}")


def test_a_changed_share_is_in_force_in_every_worker_of_both_within_a_second(gateways: Gateways) -> None:
    def look(name: str) -> Callable[[], tuple[float, float]]:
        def ask() -> tuple[float, float]:
            time.sleep(0.02)  # or the looks themselves keep the cores that the gateways need
            began = time.monotonic()
            return began, gateways.rollout(gateways.named(name))["share"]

        return ask

    seen_s: dict[str, list[float]] = {name: [] for name in WORKERS}
    old = 0.0
    with again_and_again(look("one")) as at_one, again_and_again(look("other"), 1) as at_other:
        for n in range(1, 11):
            by, new = gateways.named(("one", "other")[n % 2]), n / 16
            called_at = time.monotonic()
            change(gateways, by, "PUT", "/rollout", share=new)
            time.sleep(max(0.0, called_at + PROMISED_S + 0.1 - time.monotonic()))
            for name, answers in (("one", at_one), ("other", at_other)):
                late = [at - called_at for at, (_, share) in list(answers) if share == old]
                now = [share for _, (began, share) in list(answers) if began > called_at + PROMISED_S]
                seen_s[name].append(max(late))
                assert now
                assert set(now) == {new}
            old = new
    for name, delays in seen_s.items():
        print(
            f"\n10 changes, {name} of {WORKERS[name]} workers: last answer with the old share "
            f"{statistics.median(delays):.3f} s after the call (median), {max(delays):.3f} s (worst)"
        )


def test_a_plan_whose_gateway_is_killed_is_taken_over_and_finished_by_the_other(gateways: Gateways) -> None:
    steps = [{"share": share, "hold_s": 0.5, "samples": 20} for share in (0.4, 0.55, 0.7, 0.85, 1.0)]
    change(gateways, gateways.one, "POST", "/rollout/start", plan=plan(*steps))
    with load(gateways, *WORKERS):
        wait_until(lambda: gateways.rollout(gateways.other)["share"] > 0.4, 20, "the first step by itself")
        killed = acting(gateways)
        survivor = gateways.named(next(name for name in WORKERS if name != killed))
        before = gateways.rollout(survivor)
        with again_and_again(lambda: gateways.rollout(survivor), 1) as looks:
            gateways.named(killed).kill()
            killed_at = time.monotonic()
            wait_until(lambda: gateways.rollout(survivor)["run"]["phase"] != "running", 40, "the plan to end")
    gateways.begin_again(killed)
    moved_at = next(at for at, look in looks if at > killed_at + 0.5 and look["share"] > before["share"])
    ended_at = next(at for at, look in looks if look["run"]["phase"] != "running")
    print(
        f"\ngateway {killed} killed at share {before['share']}: next move {moved_at - killed_at:.2f} s later, "
        f"the plan's end {ended_at - killed_at:.2f} s"
    )
    assert looks[-1][1]["run"]["phase"] == "done"
    said = [look["share"] for _, look in looks]
    assert said == sorted(said)
    judged = [look["judgement"]["guards"][0]["canary"] for _, look in looks if look["judgement"]]
    assert judged == sorted(judged)  # what the first has judged counts on
    assert judged[-1] > judged[0]
    assert everywhere(gateways, 1.0)


@pytest.mark.parametrize("fault", ["hangs", "is killed"])
def test_while_redis_is_away_shares_stay_and_a_change_is_refused_and_then_the_plan_goes_on(
    gateways: Gateways, redis: RedisServer, fault: str
) -> None:
    steps = [{"share": share, "hold_s": 0, "samples": 200} for share in (0.5, 1.0)]
    change(gateways, gateways.one, "POST", "/rollout/start", plan=plan(*steps))
    wait_until(lambda: everywhere(gateways, 0.5), 10, "both to know of the plan")
    redis.hang() if fault == "hangs" else redis.kill()
    try:
        with load(gateways, *WORKERS):
            until = time.monotonic() + 2
            while time.monotonic() < until:
                assert everywhere(gateways, 0.5)
            for name in WORKERS:
                refused = gateways.say(gateways.named(name), "PUT", "/rollout", share=1.0)
                problem = refused.json()
                assert (refused.status_code, problem["type"]) == (503, "urn:sluice:problem:state-unavailable")
                assert refused.headers["content-type"] == "application/problem+json"
                assert "retry-after" in refused.headers
            assert everywhere(gateways, 0.5)
            redis.resume() if fault == "hangs" else redis.start()
            back_at = time.monotonic()
            wait_until(lambda: gateways.rollout(gateways.other)["run"]["phase"] == "done", 30, "the plan to go on")
    finally:
        redis.resume()
    print(f"\nRedis {fault}: the plan is done {time.monotonic() - back_at:.2f} s after it was back")
    assert everywhere(gateways, 1.0)


def acting(gateways: Gateways) -> str:
    """The gateway whose controller made the last step: its own log says so, the other's that it was seen."""
    by_controller = {
        name: [record["at"] for record in gateways.records(name) if record["action"] == "step"] for name in WORKERS
    }
    return max(WORKERS, key=lambda name: max(by_controller[name], default=0.0))


class load:  # noqa: N801  # reads as the word it is: `with load(...)`
    """Predictions all the time at these gateways; all are answered, but where a gateway itself is gone."""

    def __init__(self, gateways: Gateways, *names: str) -> None:
        self._blocks = [again_and_again(lambda n=name: self._ask(gateways, n)) for name in names]
        self._answers: list[list[tuple[float, int | None]]] = []

    def _ask(self, gateways: Gateways, name: str) -> int | None:
        gateway = gateways.named(name)
        try:
            return predict(gateways, gateway)
        except httpx.TransportError:
            assert not gateway.is_alive()
            time.sleep(0.05)
            return None

    def __enter__(self) -> None:
        self._answers = [block.__enter__() for block in self._blocks]

    def __exit__(self, *why: Any) -> None:
        for block in self._blocks:
            block.__exit__(*why)
        statuses = {status for answers in self._answers for _, status in answers if status is not None}
        if why == (None, None, None):
            assert statuses == {200}
