"""The backend `ray_serve`: groups of windows go to a bridge process, which is a Ray driver; this process never is.

RayServeBackend.predict ─► Coalescer, one per application ─► BridgeProcess ═ frames ═ bridge.py ─► replicas
                supervises: starts a BridgeProcess, waits for its end, starts the next
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from app.backends.base import MAX_CALL_WINDOWS, Answer, BackendStatus, Call
from app.backends.coalesce import Coalescer, Group
from app.backends.frames import Frame, FrameConnection, FrameError, Kind
from app.backends.retries import RetryBudget
from serve_app.contract import (
    APP_NAME,
    ERRORS_BY_CODE,
    DeadlineExceeded,
    ModelOutputInvalid,
    NotReady,
    Prediction,
    ReplicaLost,
    ServingError,
)
from serve_app.serve_config import SERVE_ENV

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
GOOD_LIFE_S = 10.0  # a bridge that lived this long starts the backoff anew
STARTING_LIMIT_S = 60.0  # importing Ray on a busy machine
SILENCE_LIMIT_S = 5.0  # the bridge speaks twice a second; one that is stopped or stuck is replaced
STATS_TIMEOUT_S = 1.0
END_TIMEOUT_S = 2.0

# Ray ends a driver whose control store is away for this long. The bridge decides earlier, and better: it knows
# whether replicas still answer.
RECONNECT_TIMEOUT_S = 600

FIRST_START_S = 3.0  # what a bridge takes from its start to its first good word, until one has shown it
WAY_LOOK_S = 0.02

GROUPS_PER_REPLICA = 2  # one under way, one waiting at the model for its turn

_CALL_IDS = 2**32
_LOST = "the bridge to Ray ended"
_SUMMED = ("request_count", "window_count", "queued_windows")


class OnRetry(Protocol):
    def __call__(self, *, is_made: bool) -> None: ...


class RayServeBackend:
    """Predictions from Ray Serve, through a bridge process that is started, watched and replaced.

    Args:
        ray_address: `host:port` of the cluster's control store, or `auto`. Nothing needs to be there yet.
        app_name: Application of the default version; version V is served by `APP_NAME-V`.
        max_group_windows: Most windows in one handle call.
        max_in_flight: Most handle calls under way per application; more when it has many replicas to keep busy.
        max_queued_windows: Most windows that may wait before a call and with it, per application.
        max_wait_s: Longest wait for a slot that a call is admitted to.
        environment: Variables for the bridge process, on top of this process's own.
        on_retry: Told of every group that lost its replica, with `is_made`: whether it is sent once more.
        clock: Seconds, monotonic.

    Raises:
        ValueError: A `ray://` address: Ray's client is several times slower for handles and drops their limits.
    """

    name = "ray_serve"

    def __init__(
        self,
        ray_address: str,
        *,
        app_name: str = APP_NAME,
        max_group_windows: int = 32,
        max_in_flight: int = 4,
        max_queued_windows: int = MAX_CALL_WINDOWS,
        max_wait_s: float = 0.5,
        environment: Mapping[str, str] | None = None,
        on_retry: OnRetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if "://" in ray_address:
            raise ValueError("the Ray address must be host:port of a cluster that this host is a node of, not a URL")
        self._address = ray_address
        self._app_name = app_name
        self._limits: dict[str, Any] = {
            "max_group_windows": max_group_windows,
            "max_in_flight": max_in_flight,
            "max_queued_windows": max_queued_windows,
            "max_wait_s": max_wait_s,
        }
        self._environment = dict(environment or {})
        self._clock = clock
        self._coalescers: dict[str, Coalescer] = {}
        self._served: dict[str, str | None] = {}  # by application, the version that its last answer came from
        self._bridge: BridgeProcess | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._starts = 0
        self._born = clock()
        self._start_s = FIRST_START_S
        self._retries = RetryBudget(clock)
        self._on_retry = on_retry
        self._n_retries = {True: 0, False: 0}

    async def start(self) -> None:
        self._supervision = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        for coalescer in self._coalescers.values():
            coalescer.close()

    async def predict(self, call: Call) -> Answer:
        app = self._app(call.version)
        if (reason := self._obstacle(app)) != "ok" or self._bridge is None:
            raise NotReady(_OBSTACLES[reason])
        replicas = self._bridge.apps[app]["replicas"]
        return await self._coalescer(app, replicas=replicas).predict(call)

    def is_ready(self, version: str | None = None) -> bool:
        return self._obstacle(self._app(version)) == "ok"

    def status(self) -> BackendStatus:
        reason = self._obstacle(self._app_name)
        detail: dict[str, Any] = {"starts": self._starts, "bridge": None, "apps": {}}
        if self._bridge is not None:
            detail |= {"bridge": self._bridge.state, "pid": self._bridge.pid, "apps": self._bridge.apps}
        return BackendStatus(reason == "ok", reason, detail, self._versions())

    async def stats(self) -> dict[str, Any]:
        """What replicas and coalescers count.

        Returns:
            `replicas`: one row per replica that answered in time, with its `app`; `totals` over them; `gateway`: the
            coalescer's figures by application; `retries`: groups that lost their replica, sent once more or refused
            by the budget; `rejected`: versions that replicas were told to serve and refused, why, and how many did;
            `missing`: a code by application whose replicas could not be asked.
        """
        by_app = await self._replica_stats()
        rows = [{"app": app, **row} for app, answer in by_app.items() for row in answer["replicas"]]
        return {
            "replicas": rows,
            "totals": _totals(rows),
            "retries": {"made": self._n_retries[True], "over_budget": self._n_retries[False]},
            "gateway": {app: coalescer.stats() for app, coalescer in self._coalescers.items()},
            "rejected": _rejected(rows),
            "missing": {app: answer["missing"] for app, answer in by_app.items() if "missing" in answer},
        }

    async def _replica_stats(self) -> dict[str, Any]:
        try:
            if self._bridge is None:
                raise NotReady(_OBSTACLES["no-bridge"])
            return await asyncio.wait_for(self._bridge.stats(), STATS_TIMEOUT_S)
        except ServingError as error:
            missing = error.code
        except TimeoutError:
            missing = DeadlineExceeded.code
        return {self._app_name: {"replicas": [], "missing": missing}}

    def _app(self, version: str | None) -> str:
        """The application that serves the version: the default one where it does, else the version's own."""
        if version is None or version == self._served.get(self._app_name):
            return self._app_name
        return f"{self._app_name}-{version}"

    def _versions(self) -> frozenset[str] | None:
        """Versions that applications serve now; not known before the default one's first answer."""
        if self._obstacle(self._app_name) != "ok" or self._bridge is None or self._app_name not in self._served:
            return None
        prefix = f"{self._app_name}-"
        own = {app.removeprefix(prefix) for app in self._bridge.apps if app.startswith(prefix)}
        ready = {version for version in own if self._obstacle(prefix + version) == "ok"}
        default = self._served[self._app_name]
        return frozenset(ready if default is None else ready | {default})

    def _obstacle(self, app: str) -> str:
        """What keeps the application from answering now: `ok` or a key of `_OBSTACLES`."""
        bridge = self._bridge
        if bridge is None or bridge.is_clogged:
            return "no-bridge"
        if bridge.state != "joined":
            return bridge.state
        if app not in bridge.apps:
            return "no-application"
        if not bridge.apps[app]["replicas"]:
            return "no-replica"
        return "ok" if bridge.apps[app]["ready"] else "no-answer"

    def _coalescer(self, app: str, *, replicas: int) -> Coalescer:
        """One per application, so that one that hangs fills its own slots and queue and nobody else's."""
        if app not in self._coalescers:
            for other in [name for name, coalescer in self._coalescers.items() if coalescer.is_idle]:
                del self._coalescers[other]
            self._coalescers[app] = Coalescer(lambda group: self._send(app, group), **self._limits, clock=self._clock)
        coalescer = self._coalescers[app]
        coalescer.max_in_flight = max(self._limits["max_in_flight"], GROUPS_PER_REPLICA * replicas)
        return coalescer

    async def _send(self, app: str, group: Group) -> Prediction:
        """Have the group answered; a prediction changes nothing, so it is sent once more when its replica died."""
        if not group.is_repeat:  # or what fails would pay for what is sent again
            self._retries.earn()
        try:
            return await self._send_once(app, group)
        except ReplicaLost:
            if not await self._may_retry(app, group):
                raise
        group.was_retried = True
        return await self._send_once(app, group)

    async def _send_once(self, app: str, group: Group) -> Prediction:
        if self._bridge is None:
            raise ReplicaLost(_LOST)
        prediction = await self._bridge.predict(app, group)
        self._served[app] = prediction.model_version
        return prediction

    async def _may_retry(self, app: str, group: Group) -> bool:
        """Whether to send a lost group once more: once there is a way to do so, and the budget allows it."""
        if not await self._finds_way(app, group):
            return False
        is_made = self._retries.spend()
        self._n_retries[is_made] += 1
        if self._on_retry is not None:
            self._on_retry(is_made=is_made)
        return is_made

    async def _finds_way(self, app: str, group: Group) -> bool:
        """Wait for the next bridge where it was the bridge that ended, if nobody else answers and it may be in time.

        Where another arm would answer, a single replica's successor is not waited for either.
        """
        while (reason := self._obstacle(app)) != "ok":
            opens_at = max(self._clock(), self._born + self._start_s)  # if it takes as long as the last one did
            if group.has_fallback or reason not in _ON_THE_WAY or opens_at >= group.deadline:
                return False
            await asyncio.sleep(WAY_LOOK_S)
        assert self._bridge is not None, "as there is no obstacle"
        return not group.has_fallback or self._bridge.apps[app]["replicas"] > 1

    async def _supervise(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._born = self._clock()
            self._starts += 1
            self._bridge = bridge = BridgeProcess(self._address, self._app_name, self._environment, self._clock)
            try:
                end = f"exit code {await bridge.live()}"
            except OSError as error:
                end = f"no start: {error.strerror}"
            except Exception:
                _log.exception("tending the bridge to Ray failed in an unforeseen way")
                end = "unforeseen"
            finally:
                self._bridge = None
            if bridge.joined_at is not None:
                self._start_s = bridge.joined_at - self._born
            is_good = self._clock() - self._born > GOOD_LIFE_S
            backoff_s = FIRST_BACKOFF_S if is_good else min(2 * backoff_s, MAX_BACKOFF_S)
            self._born = self._clock() + backoff_s
            _log.warning("the bridge to Ray ended (%s); starting another in %.1f s", end, backoff_s)
            await asyncio.sleep(backoff_s)


# What a bridge says that has just been started.
_ON_THE_WAY = frozenset({"no-bridge", "starting", "joining", "no-application", "no-answer"})

_OBSTACLES = {
    "no-bridge": "the bridge to Ray is being started",
    "starting": "the bridge to Ray is being started",
    "no-cluster": "there is no Ray cluster",
    "joining": "the Ray cluster is being joined",
    "no-application": "the model is not deployed",
    "no-replica": "the model has no running replica",
    "no-answer": "the model's replicas have not answered yet",
}


class BridgeProcess:
    """One life of the bridge: from its start to its end, with the calls that are under way in it.

    Attributes:
        state: `starting`, or what the bridge last said: `no-cluster`, `joining`, `joined`.
        apps: Its applications by name: `status`, `replicas`, `ready`.
        pid: Process id, None until it runs.
        joined_at: When it first told of a cluster, in seconds on the clock; None until then.
    """

    def __init__(self, address: str, app_name: str, environment: dict[str, str], clock: Callable[[], float]) -> None:
        self.state = "starting"
        self.apps: dict[str, dict[str, Any]] = {}
        self.pid: int | None = None
        self.joined_at: float | None = None
        self._arguments = ("--address", address, "--app", app_name)
        self._environment = environment
        self._clock = clock
        self._last_heard = clock()
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._call_ids = itertools.count(1)
        self._connection = FrameConnection(self._take, self._lose)

    @property
    def is_clogged(self) -> bool:
        return self._connection.is_clogged

    async def live(self) -> int:
        """Start the process, tend it until it has ended, and return its exit code."""
        try:
            process = await self._spawn()
        except BaseException:
            self._connection.close()  # should there be a child already, it ends with the socket
            raise
        self.pid = process.pid
        silence = asyncio.create_task(self._watch_silence(process))
        output = asyncio.create_task(self._log_output(process))
        try:
            return await process.wait()
        finally:
            silence.cancel()
            self._connection.close()
            await asyncio.shield(_end(process))
            await asyncio.wait({output}, timeout=END_TIMEOUT_S)  # the last words are the ones that tell why
            output.cancel()
            self._lose(None)

    async def predict(self, app: str, group: Group) -> Prediction:
        """Have the group answered.

        Raises:
            ServingError: What the model side answered, or `ReplicaLost` when the bridge ended meanwhile.
        """
        call_id = next(self._call_ids) % _CALL_IDS
        answer = self._expect(call_id)
        self._connection.send_predict(call_id, app, group)
        try:
            frame = await answer
        except asyncio.CancelledError:
            self._connection.send(Kind.CANCEL, call_id)
            raise
        finally:
            del self._answers[call_id]
        try:
            return Prediction.unpack(_result(frame).payload)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ModelOutputInvalid("the replica's answer cannot be read") from error

    async def stats(self) -> dict[str, Any]:
        call_id = next(self._call_ids) % _CALL_IDS
        answer = self._expect(call_id)
        self._connection.send(Kind.STATS, call_id)
        try:
            return _result(await answer).head
        finally:
            del self._answers[call_id]

    def _expect(self, call_id: int) -> asyncio.Future[Frame]:
        if self.state == "no-bridge":
            raise ReplicaLost(_LOST)  # calls that waited for a slot may come after `_lose` has told the others
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._answers[call_id] = answer
        return answer

    async def _spawn(self) -> Process:
        ours, theirs = socket.socketpair()
        with theirs:
            await asyncio.get_running_loop().create_unix_connection(lambda: self._connection, sock=ours)
            fd = theirs.fileno()
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "app.backends.bridge", "--fd", str(fd), *self._arguments),
                env=_environment(self._environment),
                pass_fds=(fd,),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                start_new_session=True,  # Ctrl-C reaches the gateway alone; the bridge ends with the socket
            )

    async def _log_output(self, process: Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # longer than the reader's buffer, and dropped
                continue
            if not line:
                return
            _log.warning("bridge: %s", line.decode(errors="replace").rstrip())

    async def _watch_silence(self, process: Process) -> None:
        while True:
            await asyncio.sleep(1.0)
            limit_s = STARTING_LIMIT_S if self.state == "starting" else SILENCE_LIMIT_S
            if self._clock() - self._last_heard > limit_s:
                _log.error("the bridge to Ray has been silent for %.0f s: ending it", limit_s)
                process.kill()
                return

    def _take(self, frame: Frame) -> None:
        self._last_heard = self._clock()
        match frame.kind:
            case Kind.STATUS:
                self.state, self.apps = frame.head["state"], frame.head["apps"]
                if self.state == "joined" and self.joined_at is None:
                    self.joined_at = self._last_heard
            case Kind.RESULT | Kind.ERROR:
                answer = self._answers.get(frame.call_id)
                if answer is not None and not answer.done():
                    answer.set_result(frame)
            case _:
                raise FrameError(f"a bridge does not send {frame.kind.name}")

    def _lose(self, reason: Exception | None) -> None:
        """The connection is over: nothing under way will be answered."""
        if reason is not None:
            _log.error("the connection to the bridge broke: %s", reason)
        self.state, self.apps = "no-bridge", {}
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ReplicaLost(_LOST))
                answer.exception()  # counts as seen, should its waiter be cancelled this very moment


def _result(frame: Frame) -> Frame:
    if frame.kind is Kind.ERROR:
        raise ERRORS_BY_CODE.get(frame.head["code"], ServingError)(frame.head["detail"])
    return frame


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of what adds up over replicas."""
    errors: Counter[str] = Counter()
    for row in rows:
        errors.update(row.get("errors", {}))
    counts = {name: sum(row.get(name, 0) for row in rows) for name in _SUMMED}
    return {"replicas": len(rows), **counts, "errors": dict(errors)}


def _rejected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Serve believes to be served and is not, because the replicas refused it and kept what they had."""
    refusals = Counter(
        (row["app"], *(refused[name] for name in ("model", "version", "reason")))
        for row in rows
        if (refused := row.get("rejected"))
    )
    names = ("app", "model", "version", "reason")
    return [{**dict(zip(names, refusal, strict=True)), "replicas": count} for refusal, count in refusals.items()]


async def _end(process: Process) -> None:
    """Give the process, whose socket is closed, a moment to end by itself."""
    try:
        await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The bridge's environment: ours without the gateway's secrets, with what cluster and driver must share."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "REDIS_"))}
    environment = {**ours, **SERVE_ENV, "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_TIMEOUT_S), **extra}
    has_token = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
    if has_token or Path(os.path.expanduser("~/.ray/auth_token")).exists():  # never raises, without a home
        environment.setdefault("RAY_AUTH_MODE", "token")  # given an address, Ray does not look for a token by itself
    return environment
