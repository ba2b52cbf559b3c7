"""Faults of the model: an engine that does what a file tells it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.laboratory import Laboratory, stub_application
from tests.faults.on_gateway import answers_of
from tests.faults.on_ray import see_all_replicas
from tests.faults.promises import all_answered, from_arm, gateway_lives, in_time, noted, nothing_lost, only, recovers
from tests.faults.scenario import Floor, Scenario, Step
from tests.faults.stages import body, desks, serving
from tests.integration.open_loop import Stream
from tests.integration.processes import wait_until

MARK = 13.0
REPLACED_TIMEOUT_S = 60.0


def faulty(*, legacy: str = "off", replicas: int = 2) -> Callable[[Laboratory], Floor]:
    """Ray Serve with an engine that can be told to fail, and a legacy that cannot."""

    def stage(lab: Laboratory) -> Floor:
        file = lab.folder / "fault.json"
        tell(file, "ok")
        lab.afterwards(lambda: tell(file, "ok"))
        lab.deploy(stub_application(engine="faulty", replicas=replicas, fault_file=str(file)))
        floor = serving(lab, lab.ray_environment, legacy=legacy, engine="noop")
        floor.parts["file"] = file
        return floor

    return stage


def tell(file: Path, behaviour: str, **more: Any) -> None:
    """Say what the engine shall do from its next pass on."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"behaviour": behaviour, **more}))
    os.replace(new, file)


def behave(behaviour: str, **more: Any) -> Callable[[Floor], None]:
    return lambda floor: tell(floor.parts["file"], behaviour, **more)


def note_replicas(floor: Floor) -> None:
    floor.notes["before"] = set(floor.lab.running_replicas())


def see_another_replica(floor: Floor) -> None:
    """Wait until one of the replicas was replaced, and note whether it was."""
    before = floor.notes["before"]

    def replaced() -> bool:
        running = set(floor.lab.running_replicas())
        return bool(running - before)

    wait_until(replaced, REPLACED_TIMEOUT_S, "a replica to be replaced")
    floor.notes["replaced"] = True


def output_not_a_number() -> Scenario:
    return Scenario(
        name="output-not-a-number",
        fault="the model answers NaN, nobody else to answer",
        promise="never a number: 502, then 503; 200 within 10 s of the cure",
        stage=faulty(),
        streams=desks(40),
        seconds=8.0,
        script=[Step(2.0, "the NaN", behave("nan")), Step(5.0, "the cure", behave("ok"))],
        promises=[
            *all_answered(200, 502, 503),
            only(502, 503, since="the NaN", until="the cure", skip_s=0.2),
            recovers("the cure", 10.0),
        ],
        tail_s=10.0,
    )


def output_not_a_number_with_legacy() -> Scenario:
    return Scenario(
        name="output-not-a-number-with-legacy",
        fault="the model on Ray Serve answers NaN, legacy does not",
        promise="every request 200, from legacy",
        stage=faulty(legacy="in_process"),
        streams=desks(40),
        seconds=8.0,
        script=[Step(2.0, "the NaN", behave("nan")), Step(5.0, "the cure", behave("ok"))],
        promises=[*all_answered(200), from_arm("legacy", since="the NaN", until="the cure", share=0.9)],
        tail_s=4.0,
    )


def bad_row_fails_a_pass() -> Scenario:
    """One window in 32 makes the forward pass of its whole group raise."""

    def streams(floor: Floor) -> list[Stream]:
        good = desks(80)(floor)
        marked = b"\0\0\x50\x41" + body()[4:]  # 13.0 as its first value
        return [*good, good[0]._replace(name="bad", rate_rps=80 / 31, body_hex=marked.hex())]

    return Scenario(
        name="bad-row-fails-a-pass",
        fault="one window in 32 makes the forward pass of its group raise",
        promise="502 for that request alone",
        stage=faulty(),
        streams=streams,
        script=[Step(0.0, "the fault", behave("raise", mark=MARK, ms=20))],
        seconds=10.0,
        promises=[nothing_lost, in_time, answers_of("bad", 502), answers_of("desk-a", 200), answers_of("desk-b", 200)],
    )


def large_batches_out_of_memory() -> Scenario:
    return Scenario(
        name="large-batches-out-of-memory",
        fault="the device has no memory for batches above 16 windows; requests have 20",
        promise="every request 200: the batch is halved",
        stage=faulty(),
        streams=desks(20, windows=20),
        seconds=8.0,
        script=[Step(2.0, "the shortage", behave("oom", above_windows=16)), Step(6.0, "the cure", behave("ok"))],
        promises=[*all_answered(200)],
    )


def out_of_memory() -> Scenario:
    return Scenario(
        name="out-of-memory",
        fault="the device has no memory for any batch, until a replica was replaced",
        promise="503; the replica is replaced; 200 within 15 s of the cure",
        stage=faulty(),
        streams=desks(20),
        script=[
            Step(0.0, "the beginning", note_replicas),
            Step(2.0, "the shortage", behave("oom")),
            Step(2.0, "the replacement", see_another_replica),
            Step(2.0, "the cure", behave("ok")),
            Step(2.0, "the return of all", see_all_replicas),
        ],
        promises=[
            *all_answered(200, 503, 504),
            noted("replaced", bool, "a replica that was out of memory again and again was replaced: {}"),
            recovers("the cure", 15.0),
            gateway_lives,
        ],
        tail_s=5.0,
    )


def model_hangs() -> Scenario:
    return Scenario(
        name="model-hangs",
        fault="the forward pass hangs, on every replica, until a replica was replaced; nobody else to answer",
        promise="503 or 504; the replica is replaced; 200 within 10 s of the cure",
        stage=faulty(),
        streams=desks(20),
        script=[
            Step(0.0, "the beginning", note_replicas),
            Step(2.0, "the hang", behave("hang")),
            Step(2.0, "the replacement", see_another_replica),
            Step(2.0, "the cure", behave("ok")),
            Step(2.0, "the return of all", see_all_replicas),
        ],
        promises=[*all_answered(200, 503, 504), recovers("the cure", 10.0), gateway_lives],
        tail_s=5.0,
    )


def replica_runs_out_of_luck() -> Scenario:
    return Scenario(
        name="request-kills-replica",
        fault="every 100th forward pass ends its process, nobody else to answer",
        promise="503 or 504 while both are away, for they count their passes alike; 200 within 10 s of the cure",
        stage=faulty(),
        streams=desks(20),
        seconds=15.0,
        script=[Step(1.0, "the fault", behave("exit", every=100)), Step(12.0, "the cure", behave("ok"))],
        promises=[*all_answered(200, 503, 504), recovers("the cure", 10.0), gateway_lives],
        tail_s=10.0,
    )
