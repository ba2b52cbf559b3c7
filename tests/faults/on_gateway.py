"""Faults of the gateway itself, of the machine under it, and of the clients before it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from tests.docker.edge.process import HOST, EdgeProcess, missing
from tests.faults.laboratory import GENEROUS, Laboratory, children, rss_mib
from tests.faults.promises import (
    all_answered,
    at_most,
    gateway_lives,
    in_time,
    noted,
    nothing_lost,
    of_stream,
    only,
    probe_says,
    probes_quick,
    recovers,
    supervisor_lives,
)
from tests.faults.scenario import DEADLINE_S, PROBES, Evidence, Finding, Floor, Promise, Scenario, Step, is_lost
from tests.faults.stages import PREDICT, RAW, body, desks, probes, ray, serving
from tests.integration.open_loop import Load, Plan, Stream, offer, request_bytes
from tests.integration.processes import GatewayProcess, command_of, wait_until

RESTART_TIMEOUT_S = 90.0
DESCRIPTORS = 128

# One window takes the stub 10 ms, and there are two replicas: so many requests of so many windows, and no more.
OVERLOAD_WINDOWS = 10
CAPACITY_RPS = 20.0

LEAVERS_WINDOWS = 8
LEAVE_TOGETHER = 4
LEAVE_AFTER_S = 0.04
METRICS_AGE_S = 1.1  # a scrape may be a second old


def alone(*, workers: int = 1, settings: dict[str, str] | None = None, **how: Any) -> Callable[[Laboratory], Floor]:
    """A gateway with legacy alone, a model that answers at once."""

    def stage(lab: Laboratory) -> Floor:
        environment = {"GATEWAY_WORKERS": str(workers)}
        if workers > 1:
            environment["REDIS_URL"] = lab.redis().url
        floor = serving(lab, environment, legacy="in_process", engine="noop", settings=settings, **how)
        wait_until(lambda: len(floor.gateway.worker_pids()) == workers, 30, "all workers")
        return floor

    return stage


# -- Restarts ---------------------------------------------------------------------------------------------------------


def restart_workers(floor: Floor) -> None:
    """Have every worker replaced by a new one, as an operator does, and wait until that is done."""
    before = set(floor.gateway.worker_pids())
    os.kill(floor.gateway.pid, signal.SIGHUP)

    def replaced() -> bool:
        now = set(floor.gateway.worker_pids())
        return len(now) == len(before) and not now & before

    wait_until(replaced, RESTART_TIMEOUT_S, "new workers")


def kill_a_worker(floor: Floor) -> None:
    os.kill(floor.gateway.worker_pids()[0], signal.SIGKILL)


def rolling_gateway_restart(times: int = 3, rate_rps: float = 100.0) -> Scenario:
    return Scenario(
        name="rolling-gateway-restart",
        fault=f"SIGHUP to a gateway of two workers, {times} times",
        promise="every request 200, on kept and new connections; live throughout",
        stage=alone(workers=2, settings={"GATEWAY_DRAIN_NOTICE_MS": "5000"}),
        streams=desks(rate_rps),
        tail_s=5.0,
        script=[Step(2.0 + number, f"restart {number + 1}", restart_workers) for number in range(times)],
        promises=[*all_answered(200), supervisor_lives, probe_says("live", 200, "restart 1")],
    )


def gateways_restarted_behind_the_edge(rate_rps: float = 100.0) -> Scenario:
    """Clients keep their connections to the edge, over TLS; it moves on when a gateway gives notice."""

    def stage(lab: Laboratory) -> Floor:
        assert missing() is None, missing()
        lab.end_gateway()
        gateways = {name: _start_gateway(lab, name) for name in ("first", "second")}
        for gateway in gateways.values():
            gateway.wait_for("legacy", 40)
        edge = EdgeProcess([f"127.0.0.1:{gateway.port}" for gateway in gateways.values()])
        lab.afterwards(edge.stop)
        return Floor(lab, gateways["first"], {**gateways, "edge": edge})

    def streams(floor: Floor) -> list[Stream]:
        edge: EdgeProcess = floor.parts["edge"]
        behind = {"port": edge.port, "host": HOST, "ca_file": str(edge.folder / "ca.crt")}
        return [stream._replace(**behind) for stream in desks(rate_rps)(floor) if stream.name not in PROBES]

    return Scenario(
        name="gateways-restarted-behind-the-edge",
        fault="two gateways behind the edge, each ended (SIGTERM) and started again in turn",
        promise="every request 200; exit code 0 each time",
        stage=stage,
        streams=streams,
        tail_s=3.0,
        script=[
            Step(2.0, "restart of the first", restart("first")),
            Step(2.0, "restart of the second", restart("second")),
        ],
        promises=[
            *all_answered(200),
            noted("codes", lambda codes: codes == [0, 0], "exit codes {}"),
        ],
    )


def _start_gateway(lab: Laboratory, name: str, port: int | None = None) -> GatewayProcess:
    settings = {
        **GENEROUS,
        "GATEWAY_DRAIN_NOTICE_MS": "5000",
        "GATEWAY_START_PATIENCE_MS": "15000",
        "GATEWAY_ENGINE": "noop",
        "GATEWAY_ALLOWED_HOSTS": f"{HOST},127.0.0.1",
    }
    gateway = GatewayProcess(lab.new_folder(name), settings, port=port, secret=lab.secret)
    lab.afterwards(gateway.stop)
    return gateway


def restart(name: str) -> Callable[[Floor], None]:
    def act(floor: Floor) -> None:
        old: GatewayProcess = floor.parts[name]
        floor.notes.setdefault("codes", []).append(old.stop())
        floor.parts[name] = _start_gateway(floor.lab, name, old.port)
        floor.parts[name].wait_for("legacy", 40)

    return act


def lone_worker_killed() -> Scenario:
    return Scenario(
        name="lone-worker-killed",
        fault="the only worker killed; the requests it holds are lost, connections wait for the next one",
        promise="answers again within 15 s",
        stage=alone(),
        streams=desks(20),
        tail_s=18.0,
        script=[Step(2.0, "the kill", kill_a_worker)],
        promises=[recovers("the kill", 15.0), supervisor_lives, only(200, since="the kill", skip_s=15.0)],
    )


def one_of_two_workers_killed() -> Scenario:
    return Scenario(
        name="one-of-two-workers-killed",
        fault="one of two workers killed; the requests it holds are lost",
        promise="lost is only what it held; the other answers",
        stage=alone(workers=2),
        streams=desks(100),
        tail_s=15.0,
        script=[Step(2.0, "the kill", kill_a_worker)],
        promises=[lost_only_in_flight("the kill"), in_time, only(200, since="the kill", skip_s=1.0), supervisor_lives],
    )


def lost_only_in_flight(step: str, grace_s: float = 0.5) -> Promise:
    """What is lost was under way when the step was done, or on a connection that ended with it."""

    def judge(evidence: Evidence) -> Finding:
        moment = evidence.happened[step].began
        lost = [result for result in evidence.desks.results if is_lost(result)]
        unexplained = [result for result in lost if not moment - DEADLINE_S < result.due < moment + grace_s]
        said = f"{len(lost)} of {len(evidence.desks.results)} lost, {len(unexplained)} of them not with {step}"
        return Finding(not unexplained, said)

    return judge


# -- The machine ------------------------------------------------------------------------------------------------------


def log_disk_full() -> Scenario:
    return Scenario(
        name="log-disk-full",
        fault="every write of the log fails: no space left on the device",
        promise="every request 200; log lines are dropped",
        stage=alone(under=["bash", "-c", 'exec "$@" > /dev/full 2>&1', "-"]),
        streams=desks(40),
        seconds=6.0,
        promises=[*all_answered(200), gateway_lives],
    )


def log_reader_gone() -> Scenario:
    return Scenario(
        name="log-reader-gone",
        fault="whoever reads the log through a pipe is killed",
        promise="every request 200; log lines are dropped",
        stage=alone(under=["bash", "-c", 'exec "$@" > >(exec cat > /dev/null) 2>&1', "-"]),
        streams=desks(40),
        seconds=8.0,
        script=[Step(2.0, "the kill", kill_log_reader)],
        promises=[*all_answered(200), gateway_lives],
    )


def kill_log_reader(floor: Floor) -> None:
    readers = [pid for pid in children(floor.gateway.pid) if command_of(pid).split()[:1] == ["cat"]]
    assert readers, "nobody reads the log"
    for pid in readers:
        os.kill(pid, signal.SIGKILL)


def out_of_descriptors() -> Scenario:
    """Requests on connections that are there are answered; once there are descriptors again, so are new ones."""
    return Scenario(
        name="out-of-descriptors",
        fault=f"more idle connections than the gateway may have descriptors ({DESCRIPTORS})",
        promise="connections that are there are served; new ones as soon as there are descriptors",
        stage=alone(under=["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"]),
        streams=on_kept_connections(40),
        tail_s=3.0,
        script=[
            Step(2.0, "the exhaustion", open_idle_connections),
            Step(3.0, "the look at it", note_open_descriptors),
            Step(6.0, "the relief", close_idle_connections),
            Step(7.0, "a new client", ask_on_a_new_connection),
        ],
        promises=[
            *all_answered(200),
            noted("descriptors", lambda n: n == DESCRIPTORS, f"{{}} of {DESCRIPTORS} descriptors were open"),
            noted("new client", lambda status: status == 200, "a new client was answered {}"),
            gateway_lives,
        ],
    )


def on_kept_connections(rate_rps: float) -> Callable[[Floor], list[Stream]]:
    """Both tenants, and nothing that opens a connection after the beginning."""
    return lambda floor: [stream._replace(fresh_share=0.0) for stream in desks(rate_rps)(floor)]


def open_idle_connections(floor: Floor, count: int = 200) -> None:
    lines = [socket.socket() for _ in range(count)]
    for line in lines:
        line.setblocking(False)
        line.connect_ex(("127.0.0.1", floor.gateway.port))
    floor.parts["idle"] = lines
    floor.lab.afterwards(lambda: [line.close() for line in lines])


def note_open_descriptors(floor: Floor) -> None:
    """The most that the worker was seen to have, in a second of looking."""
    (worker,) = floor.gateway.worker_pids()
    seen = []
    for _ in range(20):
        seen.append(len(os.listdir(f"/proc/{worker}/fd")))
        time.sleep(0.05)
    floor.notes["descriptors"] = max(seen)


def close_idle_connections(floor: Floor) -> None:
    for line in floor.parts["idle"]:
        line.close()


def ask_on_a_new_connection(floor: Floor) -> None:
    with floor.gateway.client("predict") as http:
        floor.notes["new client"] = http.post(PREDICT, content=body(), headers=RAW).status_code


# -- Clients ----------------------------------------------------------------------------------------------------------


def clients_leave(count: int = 500) -> Scenario:
    """What they ask for is several times what the replicas can do: were it not given up, there would be refusals."""

    def leave(floor: Floor) -> None:
        floor.notes["found before"] = found_leaving(floor)
        request = leavers_request(floor)
        for _ in range(count // LEAVE_TOGETHER):
            ask_and_reset(floor, request)

    return Scenario(
        name="clients-leave",
        fault=f"{count} clients reset their connection in the middle of their request",
        promise="they are found (499) and their work is given up; nothing under way 1 s later; others 200",
        stage=ray(),
        streams=desks(20),
        tail_s=2.0,
        script=[
            Step(2.0, "their leaving", leave),
            Step(2.0, "the last one's end", see_nothing_under_way),
            Step(2.0, "the count", note_found_leaving),
        ],
        promises=[
            *all_answered(200),
            were_found(count),
            at_most("idle_after_s", 1.0, "nothing under way {:.1f} s later"),
            gateway_lives,
        ],
    )


def were_found(count: int, share: float = 0.98) -> Promise:
    """The others had their answer, or were not heard at all, before they left."""
    least = share * count
    return noted("found", lambda found: least <= found <= count, f"{{:.0f}} of {count} found leaving (499)")


def leavers_request(floor: Floor) -> bytes:
    """Long enough under way, 80 ms, to be left."""
    headers = {**RAW, **floor.gateway.headers("predict", subject="leaver")}
    stream = Stream("leaver", floor.gateway.port, PREDICT, headers, 1.0, body_hex=body(LEAVERS_WINDOWS).hex())
    return request_bytes(stream, close=False)


def ask_and_reset(floor: Floor, request: bytes) -> None:
    """Some whole requests at once, and resets before their answers, when the gateway has had the time to read them."""
    lines = [socket.create_connection(("127.0.0.1", floor.gateway.port), 2) for _ in range(LEAVE_TOGETHER)]
    for line in lines:
        line.sendall(request)
    time.sleep(LEAVE_AFTER_S)
    for line in lines:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.close()


def found_leaving(floor: Floor) -> float:
    """Requests so far of which the gateway found that nobody waits for their answer."""
    with floor.gateway.client("ops") as http:
        lines = http.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[1]) for line in lines if line.startswith("http_requests_total{") and 'status="499"' in line
    )


def note_found_leaving(floor: Floor) -> None:
    time.sleep(METRICS_AGE_S)
    floor.notes["found"] = found_leaving(floor) - floor.notes["found before"]


def see_nothing_under_way(floor: Floor) -> None:
    """Wait until hardly more is queued and under way than what the desks ask, and note how long that took."""
    began = time.monotonic()
    with floor.gateway.client("ops") as http:

        def idle() -> bool:
            queues = http.get("/ray-serve/stats").json()["gateway"].values()
            return all(queue["queued_windows"] == 0 and queue["in_flight_groups"] <= 2 for queue in queues)

        wait_until(idle, 20, "the queue to be empty")
    floor.notes["idle_after_s"] = time.monotonic() - began


def heavy_bodies(rate_rps: float = 4.0) -> Scenario:
    def streams(floor: Floor) -> list[Stream]:
        headers = {"Content-Type": "application/json", **floor.gateway.headers("predict", subject="heavy")}
        wrong = b'{"data": [' + b",".join([b'[{"a": [1, "x"]}, null, 1e5]'] * 34_000) + b"]}"
        heavy = Stream("heavy", floor.gateway.port, PREDICT, headers, rate_rps, body_hex=wrong[: 1 << 20].hex())
        return [*desks(20)(floor), heavy]

    return Scenario(
        name="heavy-bodies",
        fault=f"{rate_rps:g} bodies a second of 1 MiB of JSON with every row wrong",
        promise="400 or 422; others 200; 95 % of the probes within 50 ms",
        stage=alone(),
        streams=streams,
        seconds=10.0,
        promises=[
            nothing_lost,
            in_time,
            answers_of("heavy", 400, 422),
            answers_of("desk-a", 200),
            probes_quick("live", 50, 95),
        ],
    )


def answers_of(stream: str, *statuses: int) -> Promise:
    def judge(evidence: Evidence) -> Finding:
        seen = evidence.desks.of(stream).statuses
        return Finding(bool(seen) and set(seen) <= set(statuses), f"{stream} was answered {dict(seen)}")

    return judge


def bad_rows(share: int = 32) -> Scenario:
    """One request in so many carries a window that is none; the others share its groups."""

    def streams(floor: Floor) -> list[Stream]:
        good = desks(40)(floor)
        bad = good[0]._replace(name="bad", rate_rps=80 / share, body_hex=(b"\0\0\xc0\x7f" + body()[4:]).hex())
        return [*good, bad]

    return Scenario(
        name="bad-rows",
        fault="one request in 32 holds a window with NaN",
        promise="422 for it alone",
        stage=ray(),
        streams=streams,
        seconds=8.0,
        promises=[nothing_lost, in_time, answers_of("bad", 422), answers_of("desk-a", 200), answers_of("desk-b", 200)],
    )


# -- Overload ---------------------------------------------------------------------------------------------------------


LONG_ENOUGH_S = 10.0  # of a shorter run, the 99th percentile is the worst answer of a few
FILLING_S = 1.0  # at the beginning, replicas and queues are empty
PEAK_SHARE = 0.75  # of what the stubs can do is what a busy machine must leave of it


def overload(times: float, name: str, seconds: float = 15.0, max_wait_ms: int | None = None) -> Scenario:
    """A flood beside a polite tenant, after loads of 0.8 and of 1.2 of the capacity for comparison.

    Args:
        times: The capacity, this often.
        max_wait_ms: The longest wait that a request is admitted to; the gateway's own unless given.
    """
    settings = {} if max_wait_ms is None else {"GATEWAY_MAX_WAIT_MS": str(max_wait_ms)}

    def stage(lab: Laboratory) -> Floor:
        floor = ray(settings=settings)(lab)
        floor.parts["calm"] = offer_beside_polite(floor, 0.8, 0.6 * seconds)
        floor.parts["full"] = offer_beside_polite(floor, 1.2, 0.6 * seconds)
        floor.notes["rss_before"] = rss_mib(floor.gateway.worker_pids()[0])
        floor.notes["replicas"] = set(lab.running_replicas())
        return floor

    percentiles = [
        latency_holds(2.0),
        of_stream("polite", latency_holds(2.0)),
        refusals_quick(20),
    ]
    return Scenario(
        name=name,
        fault=f"{times:g} times the capacity offered, a polite tenant among it",
        promise="goodput 90 % of that at 1.2 times, p99 doubled at most, refusals in 20 ms, health in 50; no replica "
        "replaced; the polite tenant answered 200, its p99 doubled at most",
        stage=stage,
        streams=flood_beside_polite(times),
        seconds=seconds,
        tail_s=0.0,
        script=[Step(seconds - 1, "the end", note_what_is_left)],
        promises=[
            nothing_lost,
            in_time,
            only(200, 503),
            goodput_holds(0.9),
            *(percentiles if seconds >= LONG_ENOUGH_S else []),
            probes_quick("live", 50),
            answers_of("polite", 200),
            noted("replaced", lambda pids: pids == set(), "replicas that came or went: {}"),
            at_most("grown_mib", 64, "the worker grew by {:.0f} MiB"),
        ],
    )


def flood_beside_polite(times: float) -> Callable[[Floor], list[Stream]]:
    def streams(floor: Floor) -> list[Stream]:
        polite, flood, *_ = desks(1.0, windows=OVERLOAD_WINDOWS)(floor)
        polite_rps = 0.1 * CAPACITY_RPS
        return [
            polite._replace(name="polite", rate_rps=polite_rps),
            flood._replace(name="flood", rate_rps=times * CAPACITY_RPS - polite_rps, connections=64),
            *probes(floor, 10.0),
        ]

    return streams


def offer_beside_polite(floor: Floor, times: float, seconds: float) -> Load:
    polite, flood, *_ = flood_beside_polite(times)(floor)
    return offer(Plan([polite, flood], seconds, core=max(os.sched_getaffinity(0))))


def note_what_is_left(floor: Floor) -> None:
    """Replicas that are not those of the beginning, and the worker's growth."""
    floor.notes["replaced"] = floor.notes["replicas"] ^ set(floor.lab.running_replicas())
    floor.notes["grown_mib"] = rss_mib(floor.gateway.worker_pids()[0]) - floor.notes["rss_before"]


def goodput_holds(share: float) -> Promise:
    """Answers keep coming at nearly the rate at which they came when there was just enough to do.

    That rate itself must deserve the name: a gateway that never reaches most of what its replicas can do, does not
    hold its peak either.
    """

    def judge(evidence: Evidence) -> Finding:
        got, peak = _goodput_rps(evidence.desks), _goodput_rps(evidence.floor.parts["full"])
        said = f"goodput {got:.1f} rps, {peak:.1f} at 1.2 (at least {share:g} of it; two stubs can do {CAPACITY_RPS:g})"
        return Finding(got >= share * peak >= share * PEAK_SHARE * CAPACITY_RPS, said)

    return judge


def _goodput_rps(load: Load) -> float:
    """Answers per second that came between the filling of the queues and the last request."""
    start, end = load.began + FILLING_S, load.began + load.seconds
    return sum(start <= result.ended < end for result in load.answered) / (end - start)


def latency_holds(times: float) -> Promise:
    def judge(evidence: Evidence) -> Finding:
        got, before = evidence.desks.answered_ms(99), calm(evidence).answered_ms(99)
        return Finding(
            got <= times * before, f"accepted p99 {got:.0f} ms, {before:.0f} at 0.8 (at most {times:g} times)"
        )

    return judge


def refusals_quick(within_ms: float) -> Promise:
    def judge(evidence: Evidence) -> Finding:
        refused = evidence.desks.refused
        half_ms, most_ms, quick_ms = (evidence.desks.refused_ms(percent) for percent in (50, 95, 99))
        said = f"{len(refused)} refusals, p50 {half_ms:.1f}, p95 {most_ms:.1f}, p99 {quick_ms:.1f} ms"
        return Finding(bool(refused) and quick_ms <= within_ms, f"{said} (p99 at most {within_ms:g})")

    return judge


def calm(evidence: Evidence) -> Load:
    load: Load = evidence.floor.parts["calm"]
    return load
