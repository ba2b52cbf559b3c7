"""Faults of Ray Serve and its cluster."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.faults.crowd import Crowd
from tests.faults.laboratory import Laboratory, freeze, stub_application
from tests.faults.promises import (
    all_answered,
    at_most,
    by_ray,
    from_arm,
    gateway_lives,
    noted,
    only,
    probe_once_says,
    probe_says,
    recovers,
    refused_quickly,
)
from tests.faults.scenario import Evidence, Finding, Floor, Promise, Scenario, Step
from tests.faults.stages import desks, ray, serving
from tests.integration.processes import command_of, wait_until

RETURN_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 5.0
KILL_PERIOD_S = 5.0
KILLED_SHARE = 0.9


def every(period_s: float, until_s: float, name: str, act: Callable[[Floor], Any]) -> list[Step]:
    times = range(1, int(until_s / period_s) + 1)
    return [Step(period_s * number, name, act) for number in times]


def kill_one_of_two(floor: Floor) -> None:
    """A machine that is slow to start another one gets the time for it, for somebody must be there to answer."""
    see_all_replicas(floor)
    kill_a_replica(floor)


def kill_a_replica(floor: Floor) -> None:
    """Whichever runs, and see its process gone: only then was it a kill."""
    wait_until(lambda: bool(floor.lab.running_replicas()), RETURN_TIMEOUT_S, "a replica")
    pid = floor.lab.running_replicas()[0]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not command_of(pid), KILL_TIMEOUT_S, "the killed replica's end")
    floor.notes.setdefault("kills", []).append(time.monotonic())


def were_killed(planned: int, within_s: float) -> Promise:
    """Ten of eleven kills were done, and in a rhythm that deserves the name."""

    def judge(evidence: Evidence) -> Finding:
        at_s = [moment - evidence.desks.began for moment in evidence.floor.notes.get("kills", [])]
        least, in_time = math.ceil(KILLED_SHARE * planned), sum(each <= within_s for each in at_s)
        said = f"{len(at_s)} of {planned} kills, the last after {max(at_s, default=0.0):.0f} s"
        return Finding(in_time >= least, f"{said} (at least {least} in {within_s:g} s)")

    return judge


def kill_all_replicas(floor: Floor) -> None:
    pids = floor.lab.running_replicas()
    floor.notes["killed"] = pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def freeze_a_replica(floor: Floor) -> None:
    pid = floor.lab.running_replicas()[0]
    floor.notes["frozen"] = pid
    freeze(floor.lab, pid)


def see_a_new_replica(floor: Floor) -> None:
    """Wait until a replica runs that is none of those that were killed."""
    killed = set(floor.notes["killed"])
    wait_until(lambda: bool(set(floor.lab.running_replicas()) - killed), RETURN_TIMEOUT_S, "a new replica")


def see_the_frozen_one_replaced(floor: Floor) -> None:
    frozen = floor.notes["frozen"]

    def replaced() -> bool:
        running = floor.lab.running_replicas()
        return frozen not in running and len(running) == 2

    began = time.monotonic()
    wait_until(replaced, RETURN_TIMEOUT_S, "the replica's replacement")
    floor.notes["replaced_s"] = time.monotonic() - began


def see_all_replicas(floor: Floor) -> None:
    wait_until(lambda: len(floor.lab.running_replicas()) == 2, RETURN_TIMEOUT_S, "both replicas")


def kill_controller(floor: Floor) -> None:
    os.kill(floor.lab.cluster_process("ServeController"), signal.SIGKILL)


def kill_control_store(floor: Floor) -> None:
    os.kill(floor.lab.cluster_process("gcs_server"), signal.SIGKILL)


def kill_head(floor: Floor) -> None:
    floor.lab.kill_head()


def start_new_head(floor: Floor) -> None:
    floor.lab.replace_head()


def deploy_again(floor: Floor) -> None:
    floor.lab.deploy(stub_application(engine=floor.parts.get("engine", "sleep")))


def redeploy(floor: Floor) -> None:
    """Change what restarts replicas, one after another, and wait until it has."""
    lab = floor.lab
    floor.notes["redeploys"] = number = floor.notes.get("redeploys", 0) + 1
    config = stub_application(engine="noop")
    config["applications"][0]["args"]["stall_s"] = 5.0 + number
    before = set(lab.running_replicas())
    lab.deploy(config)
    wait_until(lambda: len(after := set(lab.running_replicas())) == 2 and not after & before, 60, "new replicas")


def replica_killed(seconds: float = 60.0) -> Scenario:
    kills = every(KILL_PERIOD_S, seconds - KILL_PERIOD_S, "the kill", kill_one_of_two)
    return Scenario(
        name="replica-killed",
        fault="one of two replicas killed every 5 s, nobody else to answer",
        promise="every request 200 from Ray Serve, by one retry",
        stage=ray(),
        streams=desks(40),
        seconds=seconds,
        script=kills,
        promises=[*all_answered(200), from_arm("ray_serve"), were_killed(len(kills), 1.5 * seconds)],
    )


def replica_killed_with_legacy(seconds: float = 60.0) -> Scenario:
    kills = every(KILL_PERIOD_S, seconds - KILL_PERIOD_S, "the kill", kill_one_of_two)
    return Scenario(
        name="replica-killed-with-legacy",
        fault="one of two replicas of the shipped model killed every 5 s or when both are back, legacy behind them",
        promise="every request 200, from whichever arm, half of them at least from Ray Serve",
        stage=ray(engine="torch", legacy="in_process"),
        streams=desks(40),
        seconds=seconds,
        script=kills,
        promises=[
            *all_answered(200),
            from_arm("ray_serve", share=0.5),
            were_killed(len(kills), 2 * seconds),  # the shipped model takes a replica its time to load
        ],
    )


def all_replicas_killed() -> Scenario:
    return Scenario(
        name="all-replicas-killed",
        fault="every replica killed at once, nobody else to answer",
        promise="503 or 504, soon 503 within 20 ms with Retry-After; answers 2 s after a replica is back",
        stage=ray(),
        streams=desks(40),
        tail_s=6.0,
        script=[
            Step(2.0, "the kill", kill_all_replicas),
            Step(2.0, "a replica's return", see_a_new_replica),
            Step(2.0, "the return of all", see_all_replicas),
        ],
        promises=[
            *all_answered(200, 503, 504),
            refused_quickly("the kill", "a replica's return", 20, skip_s=1.0),
            probe_says("live", 200, "the kill"),
            probe_once_says("ready", 503, "the kill", "a replica's return"),
            recovers("a replica's return", 2.0),
        ],
    )


def retry_storm(clients: int = 200) -> Scenario:
    """Everybody who was refused comes back when it was told to, and nobody is knocked over by that."""

    def stage(lab: Laboratory) -> Floor:
        floor = ray()(lab)
        desk, *_ = desks(1)(floor)
        floor.parts["crowd"] = crowd = Crowd(desk._replace(name="crowd"), clients)
        lab.afterwards(crowd.end)
        return floor

    def see_all_served(floor: Floor) -> None:
        crowd, back = floor.parts["crowd"], time.monotonic()
        wait_until(lambda: crowd.all_served_after(back) is not None, RETURN_TIMEOUT_S, "everybody to be served")
        floor.notes["served_s"] = crowd.all_served_after(back) - back
        floor.notes["crowd"] = dict(crowd.statuses)

    return Scenario(
        name="retry-storm",
        fault=f"every replica killed under {clients} clients that retry when they are told to, and two desks",
        promise="503 or 504; everybody is answered within 15 s of the replicas' return",
        stage=stage,
        streams=desks(20),
        script=[
            Step(5.0, "the kill", kill_all_replicas),
            Step(5.0, "the return of all", see_all_replicas_anew),
            Step(5.0, "the last one's answer", see_all_served),
        ],
        promises=[
            *all_answered(200, 503, 504),
            recovers("the return of all", 5.0),
            at_most("served_s", 15, "everybody was served within {:.1f} s"),
            noted("crowd", lambda seen: isinstance(seen, dict) and set(seen) <= {200, 503, 504}, "their answers: {}"),
        ],
    )


def see_all_replicas_anew(floor: Floor) -> None:
    see_a_new_replica(floor)
    see_all_replicas(floor)


def replica_frozen() -> Scenario:
    return Scenario(
        name="replica-frozen",
        fault="one of two replicas stopped (SIGSTOP), nobody else to answer",
        promise="504 at worst for what it holds; replaced within 20 s",
        stage=ray(),
        streams=desks(20),
        tail_s=4.0,
        script=[Step(2.0, "the stop", freeze_a_replica), Step(2.0, "its replacement", see_the_frozen_one_replaced)],
        promises=[
            *all_answered(200, 503, 504),
            recovers("the stop", 20.0),
            only(200, since="its replacement", skip_s=1.0),
            at_most("replaced_s", 20, "replaced after {:.1f} s"),
        ],
    )


def controller_killed() -> Scenario:
    return Scenario(
        name="controller-killed",
        fault="Serve's controller killed",
        promise="nobody notices",
        stage=ray(),
        streams=desks(40),
        seconds=12.0,
        script=[Step(3.0, "the kill", kill_controller)],
        promises=[*all_answered(200), from_arm("ray_serve")],
    )


def control_store_killed() -> Scenario:
    return Scenario(
        name="control-store-killed",
        fault="the cluster's control store killed, a new head 10 s later, deployed again",
        promise="legacy answers throughout; Ray Serve again within 10 s of RUNNING; the gateway's process stays",
        stage=ray(engine="noop", legacy="in_process"),
        streams=desks(40),
        tail_s=12.0,
        script=_new_head("noop", kill_control_store),
        promises=_NEW_HEAD_PROMISES,
    )


def head_replaced() -> Scenario:
    return Scenario(
        name="head-replaced",
        fault="the whole cluster killed, a new one at its address, deployed again; the shipped model on both sides",
        promise="legacy answers throughout; Ray Serve again within 10 s of RUNNING; the gateway's process stays",
        stage=ray(engine="torch", legacy="in_process"),
        streams=desks(40),
        tail_s=12.0,
        script=_new_head("torch", kill_head),
        promises=[
            *_NEW_HEAD_PROMISES,
            from_arm("legacy", since="the kill", until="the application's return", share=0.9),
        ],
    )


def _new_head(engine: str, kill: Callable[[Floor], Any]) -> Sequence[Step]:
    def end_the_old(floor: Floor) -> None:
        floor.parts["engine"] = engine
        floor.lab.kill_head()

    return [
        Step(2.0, "the kill", kill),
        Step(11.0, "the old head's end", end_the_old),
        Step(12.0, "the new head", start_new_head),
        Step(12.0, "the application's return", deploy_again),
    ]


_NEW_HEAD_PROMISES = [
    *all_answered(200),
    gateway_lives,
    probe_says("ready", 200, "the kill"),
    recovers("the application's return", 10.0, by_ray, "Ray Serve answers"),
]


def no_cluster_at_start() -> Scenario:
    def stage(lab: Laboratory) -> Floor:
        lab.end_gateway()
        lab.end_cluster()
        planned = lab.plan_head()
        floor = serving(lab, lab.join(planned), engine="noop", wait_for=[])
        floor.parts |= {"planned": planned, "engine": "noop"}
        wait_until(lambda: floor.gateway.arm_status("ray_serve") != "away", 30, "the gateway to listen")
        floor.notes["listening_s"] = time.monotonic() - floor.gateway.started_at
        return floor

    def start_the_first_head(floor: Floor) -> None:
        floor.lab.start_head(floor.parts["planned"])

    return Scenario(
        name="no-cluster-at-start",
        fault="the gateway started without a cluster, which comes later; nobody else to answer",
        promise="live at once, not ready, 503 within 20 ms; Ray Serve within 10 s of RUNNING",
        stage=stage,
        streams=desks(20),
        tail_s=12.0,
        script=[
            Step(0.0, "the beginning", lambda _: None),
            Step(5.0, "the head", start_the_first_head),
            Step(5.0, "the application", deploy_again),
        ],
        promises=[
            *all_answered(200, 503),
            gateway_lives,
            refused_quickly("the beginning", "the head", 20, skip_s=0.0),
            probe_says("live", 200, "the beginning"),
            probe_says("ready", 503, "the beginning", "the head"),
            recovers("the application", 10.0, by_ray, "Ray Serve answers"),
            at_most("listening_s", 3, "listening after {:.1f} s"),
        ],
    )


def rolling_redeploy(times: int = 3, rate_rps: float = 60.0, seconds: float = 87.0) -> Scenario:
    gap_s = seconds / times
    return Scenario(
        name="rolling-redeploy",
        fault=f"{times} redeploys that restart both replicas in turn, nobody else to answer",
        promise="every request 200 from Ray Serve",
        stage=ray(engine="noop"),
        streams=desks(rate_rps),
        seconds=seconds,
        script=[Step(2 + gap_s * number, "the redeploy", redeploy) for number in range(times)],
        promises=[*all_answered(200), from_arm("ray_serve")],
    )
