"""Faults of what stands beside the gateway: Redis, the old service, the bridge to Ray, the registry, the clock."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.auth import mint_token
from serve_app.artefacts import import_folder
from serve_app.registry import Registry
from tests.app.backends.old_service import OldService
from tests.faults.laboratory import (
    SHIPPED_MODELS,
    Laboratory,
    bridges_of,
    freeze,
    run_python,
    stub_application,
)
from tests.faults.promises import (
    all_answered,
    by_legacy,
    by_ray,
    from_arm,
    gateway_lives,
    in_time,
    noted,
    nothing_lost,
    of_stream,
    only,
    quick_but_for,
    recovers,
    refused_quickly,
    shows,
    slowest_within,
    versions_are,
)
from tests.faults.scenario import Floor, Scenario, Step
from tests.faults.stages import RAW, desks, ray, serving
from tests.faults.toxic import CLEAN, Toxics
from tests.integration.open_loop import Result, Stream
from tests.serve_app.model_files import renamed_tensors, truncated, without_values, wrong_dtype, wrong_shapes

EX_CONFIG = 78
RETURN_TIMEOUT_S = 60.0
REMOTE_LIMIT_S = 0.5

# -- Redis ------------------------------------------------------------------------------------------------------------


def with_redis(*, is_there: bool = True) -> Callable[[Laboratory], Floor]:
    """A gateway whose limits are kept in Redis, behind a proxy; its model answers at once."""

    def stage(lab: Laboratory) -> Floor:
        redis = lab.redis()
        proxy = lab.proxy(redis.port)
        if not is_there:
            proxy.down()
        environment = {"REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0", "GATEWAY_WORKERS": "2"}
        floor = serving(lab, environment, legacy="in_process", engine="noop")
        floor.parts |= {"redis": redis, "proxy": proxy}
        return floor

    return stage


def limits_are(mode: str) -> Callable[[Result], bool]:
    """An answer whose limit was counted in Redis (empty) or here (`local`)."""
    return lambda result: result.status == 200 and result.headers.get("x-ratelimit-mode", "") == mode


def bad_network(toxics: Toxics) -> Callable[[Floor], None]:
    def act(floor: Floor) -> None:
        floor.parts["proxy"].toxics = toxics

    return act


def redis_fault(
    name: str, fault: str, break_it: Callable[[Floor], Any], mend_it: Callable[[Floor], Any], *, seconds: float = 6.0
) -> Scenario:
    return Scenario(
        name=name,
        fault=fault,
        promise="every request 200; three pay 50 ms at most, then local limits; shared ones within 5 s of the cure",
        stage=with_redis(),
        streams=desks(40),
        script=[Step(4.0, "the fault", break_it), Step(4.0 + seconds, "the cure", mend_it)],
        tail_s=7.0,
        promises=[
            *all_answered(200),
            quick_but_for(3, "the fault", "the cure", over_ms=45),
            recovers("the fault", 1.0, limits_are("local"), "local limits"),
            recovers("the cure", 5.0, limits_are(""), "shared limits"),
            gateway_lives,
        ],
    )


def redis_killed() -> Scenario:
    return redis_fault(
        "redis-killed",
        "redis-server killed, and started again",
        lambda floor: floor.parts["redis"].kill(),
        lambda floor: floor.parts["redis"].start(),
    )


def redis_frozen() -> Scenario:
    return redis_fault(
        "redis-frozen",
        "redis-server stopped (SIGSTOP), and continued",
        lambda floor: floor.parts["redis"].hang(),
        lambda floor: floor.parts["redis"].resume(),
    )


def redis_slow() -> Scenario:
    return redis_fault(
        "redis-slow", "every answer of Redis 200 ms late", bad_network(Toxics(latency_s=0.1)), bad_network(CLEAN)
    )


def redis_silent() -> Scenario:
    fault = "the way to Redis takes bytes and gives none"
    return redis_fault("redis-silent", fault, bad_network(Toxics(blackhole=True)), bad_network(CLEAN))


def redis_refuses_writes() -> Scenario:
    def fill(floor: Floor) -> None:
        floor.parts["redis"].say("SCRIPT", "FLUSH")
        floor.parts["redis"].say("CONFIG", "SET", "maxmemory", "1")

    def empty(floor: Floor) -> None:
        floor.parts["redis"].say("CONFIG", "SET", "maxmemory", "0")

    return redis_fault("redis-out-of-memory", "Redis has lost its scripts and has no memory to write", fill, empty)


def redis_read_only() -> Scenario:
    def follow(floor: Floor) -> None:
        floor.parts["redis"].say("REPLICAOF", "127.0.0.1", "1")

    def lead(floor: Floor) -> None:
        floor.parts["redis"].say("REPLICAOF", "NO", "ONE")

    return redis_fault("redis-read-only", "Redis has become somebody's replica, and read-only", follow, lead)


def redis_away_at_start() -> Scenario:
    return Scenario(
        name="redis-away-at-start",
        fault="the gateway started without Redis, which comes later",
        promise="every request 200; shared limits within 5 s of its coming",
        stage=with_redis(is_there=False),
        streams=desks(40),
        script=[Step(4.0, "its coming", lambda floor: floor.parts["proxy"].up())],
        tail_s=7.0,
        promises=[*all_answered(200), recovers("its coming", 5.0, limits_are(""), "shared limits")],
    )


# -- The old service --------------------------------------------------------------------------------------------------


class OldServiceThread:
    """The stand-in for the old service, on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._service = OldService()
        asyncio.run_coroutine_threadsafe(self._service.__aenter__(), self._loop).result(10)
        self.port = self._service.port

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._service.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def with_old_service(lab: Laboratory) -> Floor:
    """Ray Serve with a stub, and an old service behind a network that can be bad."""
    lab.deploy(stub_application())
    old = OldServiceThread()
    lab.afterwards(old.close)
    proxy = lab.proxy(old.port)
    settings = {"GATEWAY_LEGACY_URL": f"http://127.0.0.1:{proxy.port}"}
    floor = serving(lab, lab.ray_environment, legacy="remote", settings=settings)
    floor.parts |= {"proxy": proxy, "old": old}
    return floor


def on_both_arms(floor: Floor) -> list[Stream]:
    """One tenant for each arm, and none is helped by the other."""
    desk, *_ = desks(20)(floor)
    headers = {**RAW, **floor.gateway.headers("predict ops")}
    return [
        desk._replace(name=arm, rate_rps=20, headers={**headers, "X-Route-To": arm}) for arm in ("ray_serve", "legacy")
    ]


def legacy_fault(name: str, fault: str, toxics: Toxics) -> Scenario:
    return Scenario(
        name=name,
        fault=fault,
        promise="Ray Serve's requests 200 and as quick; legacy's 502 to 504 within 500 ms; 200 within 7 s of the cure",
        stage=with_old_service,
        streams=on_both_arms,
        script=[Step(3.0, "the fault", bad_network(toxics)), Step(6.0, "the cure", bad_network(CLEAN))],
        tail_s=8.0,
        promises=[
            nothing_lost,
            in_time,
            of_stream("ray_serve", only(200)),
            of_stream("ray_serve", quick_but_for(3, "the fault", "the cure", over_ms=150)),
            of_stream("legacy", only(200, 502, 503, 504)),
            of_stream("legacy", slowest_within(REMOTE_LIMIT_S)),
            of_stream("legacy", shows("the fault", "the cure")),
            of_stream("legacy", refused_quickly("the fault", "the cure", 50, skip_s=1.0)),
            of_stream("legacy", recovers("the cure", 7.0)),
        ],
    )


def legacy_slow() -> Scenario:
    return legacy_fault("legacy-slow", "every answer of the old service 2 s late", Toxics(latency_s=1.0))


def legacy_resets() -> Scenario:
    return legacy_fault("legacy-resets", "every connection to the old service reset", Toxics(reset=True))


def legacy_torn() -> Scenario:
    return legacy_fault("legacy-torn", "answers of the old service end after 100 bytes", Toxics(limit_bytes=100))


def legacy_sliced() -> Scenario:
    return legacy_fault(
        "legacy-sliced",
        "requests and answers in slices of 512 bytes, 20 ms apart",
        Toxics(slice_bytes=512, slice_wait_s=0.02),
    )


def legacy_silent() -> Scenario:
    return legacy_fault(
        "legacy-silent", "the way to the old service takes bytes and gives none", Toxics(blackhole=True)
    )


def legacy_down() -> Scenario:
    scenario = legacy_fault("legacy-down", "the old service refuses connections", CLEAN)
    script = [
        Step(3.0, "the fault", lambda floor: floor.parts["proxy"].down()),
        Step(6.0, "the cure", lambda floor: floor.parts["proxy"].up()),
    ]
    return replace(scenario, script=script)


# -- The bridge -------------------------------------------------------------------------------------------------------


def bridge_frozen() -> Scenario:
    return Scenario(
        name="bridge-frozen",
        fault="the bridge to Ray stopped (SIGSTOP), legacy behind it",
        promise="every request 200; Ray Serve again within 30 s",
        stage=ray(engine="noop", legacy="in_process"),
        streams=desks(40),
        script=[
            Step(3.0, "the stop", lambda floor: freeze(floor.lab, bridges_of(floor.gateway)[0])),
            Step(9.0, "the return", see_ray_answer),
        ],
        promises=[
            *all_answered(200),
            recovers("the stop", 30.0, by_ray, "Ray Serve answers", once=by_legacy),
            from_arm("legacy", since="the stop", share=0.1),
            gateway_lives,
        ],
    )


def bridge_killed() -> Scenario:
    return Scenario(
        name="bridge-killed",
        fault="the bridge to Ray killed, legacy behind it",
        promise="every request 200; Ray Serve again within 20 s",
        stage=ray(engine="noop", legacy="in_process"),
        streams=desks(40),
        script=[
            Step(3.0, "the kill", lambda floor: os.kill(bridges_of(floor.gateway)[0], signal.SIGKILL)),
            Step(5.0, "the return", see_ray_answer),
        ],
        promises=[
            *all_answered(200),
            recovers("the kill", 20.0, by_ray, "Ray Serve answers", once=by_legacy),
            gateway_lives,
        ],
    )


def see_ray_answer(floor: Floor) -> None:
    floor.gateway.wait_for("ray_serve", RETURN_TIMEOUT_S)


# -- The registry -----------------------------------------------------------------------------------------------------


def with_own_registry(lab: Laboratory) -> Floor:
    """The shipped model on both arms, from a registry that may be harmed."""
    registry = lab.new_folder("registry") / "models"
    shutil.copytree(SHIPPED_MODELS, registry)
    lab.deploy(stub_application(engine="torch", registry=registry, version="1"))
    settings = {"MODEL_REGISTRY_PATH": str(registry)}
    floor = serving(lab, lab.ray_environment, legacy="in_process", engine="torch", settings=settings)
    floor.parts["registry"] = registry
    return floor


def registry_away() -> Scenario:
    def move_away(floor: Floor) -> None:
        registry: Path = floor.parts["registry"]
        registry.rename(registry.with_name("gone"))

    def start_another(floor: Floor) -> None:
        environment = {**os.environ, "MODEL_REGISTRY_PATH": str(floor.parts["registry"])}
        secret = {"GATEWAY_JWT_SECRET": floor.lab.secret, "GATEWAY_STATE_DIR": str(floor.lab.new_folder("state"))}
        ended = run_python("-m", "app.cli", "serve", "--port", "0", env={**environment, **secret}, timeout=60)
        said = str(floor.parts["registry"]) in "".join((ended.stdout + ended.stderr).split("\n"))
        floor.notes["start"] = (ended.returncode, said)

    return Scenario(
        name="registry-away",
        fault="the registry moved away under a running service, and another gateway started without it",
        promise="every request 200; the other ends with 78 and names the path",
        stage=with_own_registry,
        streams=desks(20),
        script=[Step(2.0, "the move", move_away), Step(3.0, "the start of another", start_another)],
        promises=[
            *all_answered(200),
            noted("start", lambda seen: seen == (EX_CONFIG, True), "the other ended with (78, path named): {}"),
        ],
    )


def bad_versions_published() -> Scenario:
    evils = (truncated, renamed_tensors, wrong_shapes, wrong_dtype, without_values)

    def publish_and_deploy(floor: Floor) -> None:
        root: Path = floor.parts["registry"]
        shipped = root / "cnn_lstm" / "1"
        floor.notes["rejected"] = 0
        for version in _publish_bad(root, shipped, evils):
            with floor.lab.api() as api:
                api.put(stub_application(engine="torch", registry=root, version=version))
            floor.notes["rejected"] += _was_rejected(floor, version)
        floor.lab.forget_deployment()

    return Scenario(
        name="bad-versions-published",
        fault="six bad versions deployed: cut short, renamed, other shapes, other types, empty, changed later",
        promise="every request 200 by the old version; each bad one rejected by name",
        stage=with_own_registry,
        streams=desks(20),
        script=[Step(2.0, "their deployment", publish_and_deploy)],
        promises=[
            *all_answered(200),
            from_arm("ray_serve", share=0.99),
            noted("rejected", lambda count: count == len(evils) + 1, "{} versions rejected by name on every replica"),
            versions_are({"1"}),
        ],
    )


def _publish_bad(root: Path, shipped: Path, evils: tuple[Callable[[Path], bytes], ...]) -> list[str]:
    """Sealed as they are, and one more that was changed after its sealing."""
    registry = Registry(root)
    good = import_folder(shipped)
    published = [
        registry.publish("cnn_lstm", files={**good.files, "model.safetensors": evil(root / "canary")}, **good.facts)
        for evil in evils
    ]
    changed = registry.publish("cnn_lstm", files=good.files, **good.facts)
    weights = root / "cnn_lstm" / changed / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    return [*published, changed]


def _was_rejected(floor: Floor, version: str, timeout_s: float = 15.0) -> bool:
    """Whether every replica says so in time."""
    deadline = time.monotonic() + timeout_s
    with floor.gateway.client("ops") as http:
        while time.monotonic() < deadline:
            rows = http.get("/ray-serve/stats").json()["replicas"]
            if rows and all((row["rejected"] or {}).get("version") == version for row in rows):
                return True
            time.sleep(0.1)
    return False


# -- The clock --------------------------------------------------------------------------------------------------------


def _faketime() -> str:
    """Debian's library that gives a process another time."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    assert found, "apt-get install faketime"
    return str(found[0])


def with_own_clock(lab: Laboratory) -> Floor:
    """A gateway whose wall clock is what a file says; the monotonic one cannot jump."""
    clock = lab.new_folder("clock") / "now"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": _faketime(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",  # in seconds; without, the file is read each time that a clock is
        "DONT_FAKE_MONOTONIC": "1",
    }
    under = ["env", *(f"{name}={value}" for name, value in faked.items())]
    floor = serving(lab, {}, legacy="in_process", engine="noop", under=under)
    floor.parts["clock"] = clock
    return floor


def jump(to: str) -> Callable[[Floor], None]:
    def act(floor: Floor) -> None:
        new = floor.parts["clock"].with_suffix(".new")
        new.write_text(to)
        os.replace(new, floor.parts["clock"])

    return act


def with_long_tokens(floor: Floor) -> list[Stream]:
    """Desks whose tokens hold ten hours before and after now: an hour is nothing to them, and ten years everything."""
    token = mint_token(
        floor.lab.secret.encode(),
        subject="desk",
        scopes=["predict"],
        issuer="sluice",
        audience="sluice",
        lifetime_s=20 * 3600,
        now=time.time() - 10 * 3600,
    )
    headers = {**RAW, "Authorization": f"Bearer {token}"}
    return [stream._replace(headers=headers) if stream.headers else stream for stream in desks(40)(floor)]


def clock_jumps() -> Scenario:
    far = ("ten years ahead", "ten years back")
    return Scenario(
        name="clock-jumps",
        fault="the wall clock jumps an hour ahead, an hour back, ten years ahead, ten years back",
        promise="tokens by the wall clock, durations by the monotonic one; 401 or 429 where a token is out of its time",
        stage=with_own_clock,
        streams=with_long_tokens,
        script=[
            Step(2.0, "an hour ahead", jump("+1h")),
            Step(5.0, "an hour back", jump("-1h")),
            Step(8.0, far[0], jump("+10y")),
            Step(11.0, far[1], jump("-10y")),
            Step(14.0, "the right time", jump("+0")),
        ],
        promises=[
            nothing_lost,
            in_time,
            only(200, since="an hour ahead", until=far[0]),
            only(401, 429, since=far[0], until="the right time", skip_s=1.5),
            only(200, since="the right time", skip_s=1.5),
            gateway_lives,
        ],
        tail_s=4.0,
    )
