"""The bridge: the one process of a gateway that is a Ray driver, run as `python -m app.backends.bridge`.

Ray ends the driver process when the cluster's head stays away, and `ray.init` without a cluster blocks for minutes.
The gateway must outlive both, so it starts this child, talks to it in frames over an inherited socket, and starts a
new one when it ends. Whatever cannot be repaired from inside is answered by ending: a new process joins afresh.

    waiting for the cluster's port ──► joining (`ray.init`) ──► serving: calls, status twice a second
    end of file on the socket: the gateway is gone, exit 0      no way back to the cluster: exit 75, start me again
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
import ray
import uvloop
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from app.backends.base import FAIR_BUDGET_S
from app.backends.frames import Frame, FrameConnection, FrameError, Kind, Predict
from serve_app.contract import (
    DeadlineExceeded,
    NotReady,
    Overloaded,
    ReplicaLost,
    ServingError,
    Unavailable,
)

_log = logging.getLogger(__name__)

EX_TEMPFAIL = 75  # sysexits.h: try again later

STATUS_PERIOD_S = 0.5
SETTLED_PERIOD_S = 1.0  # while all is well: a look costs the controller and this process some 20 ms of CPU each
STATUS_PATIENCE_S = 1.0
NEWS_PAUSE_S = 0.05
PORT_TIMEOUT_S = 1.0
JOIN_TIMEOUT_S = 20.0
FIRST_ANSWER_TIMEOUT_S = 5.0
STATS_TIMEOUT_S = 0.8

# What Serve, Ray and gRPC raise, and what it means to a caller; the first match counts.
_MEANINGS: tuple[tuple[type[BaseException], type[ServingError], str], ...] = (
    (TimeoutError, DeadlineExceeded, "no replica answered before the deadline"),
    (BackPressureError, Overloaded, "the replicas' queues are full"),
    (DeploymentUnavailableError, NotReady, "the application has no replica"),
    (RayActorError, ReplicaLost, "the replica died before it answered"),
    (NodeDiedError, ReplicaLost, "the replica's node died before it answered"),
    (WorkerCrashedError, ReplicaLost, "the replica died before it answered"),
    (ObjectLostError, ReplicaLost, "the replica died before it answered"),
    # Nobody here cancels without leaving: a replica that ends does so to what it has not begun.
    (RequestCancelledError, ReplicaLost, "the replica ended before it answered"),
    (TaskCancelledError, ReplicaLost, "the replica ended before it answered"),
    (grpc.RpcError, ReplicaLost, "the connection to the replica broke"),
    (RaySystemError, Unavailable, "the cluster is in trouble"),
)


# What Serve makes of a gRPC call that ended before the replica had said whether it takes it.
_UNTOLD = "Unexpected error (StatusCode."


# A replica that a new controller looks up again has never stopped to answer.
_ANSWERING = ("RUNNING", "RECOVERING")


class Stranded(Exception):
    """This process has no way back to the cluster; a new one would have."""


@dataclass(frozen=True, slots=True)
class AppState:
    """One Serve application as the gateway is told of it.

    Attributes:
        status: Serve's own word, `RUNNING` or `DEPLOYING` for example.
        replicas: Running replicas.
        ready: It has replicas, and one has answered through our handle.
    """

    status: str
    replicas: int
    ready: bool


class Liveness:
    """Decides from what was seen and answered whether this process is stranded.

    After the controller was replaced, or the whole cluster, handles stay silent for good, and nothing says so.
    A control plane that is away while replicas answer is no reason to end: the calls still work.

    Args:
        now: Seconds on the monotonic clock.
    """

    BLIND_LIMIT_S = 12.0  # of two probes of an idle gateway, one may be late
    SILENT_LIMIT_S = 10.0
    SILENT_CALLS = 5

    def __init__(self, now: float) -> None:
        self._blind_since: float | None = None
        self._last_answer = now
        self._unanswered = 0

    def saw(self, n_replicas: int) -> None:
        self._blind_since = None
        if n_replicas == 0:
            self._unanswered = 0  # there was nobody to answer

    def saw_nothing(self, now: float) -> None:
        if self._blind_since is None:
            self._blind_since = now

    def answered(self, now: float) -> None:
        self._last_answer = now
        self._unanswered = 0

    def unanswered(self, budget_s: float) -> None:
        if budget_s >= FAIR_BUDGET_S:
            self._unanswered += 1

    def verdict(self, now: float) -> str | None:
        """Why this process is stranded, or None."""
        silent_s = now - self._last_answer
        if self._blind_since is not None and min(now - self._blind_since, silent_s) >= self.BLIND_LIMIT_S:
            return "the control plane is away and no replica answers"
        if self._unanswered >= self.SILENT_CALLS and silent_s >= self.SILENT_LIMIT_S:
            return "replicas are said to run and none answers"
        return None


class Cluster:
    """The Ray side: the applications that are ours and the handles to them.

    Args:
        app_name: Name of the default application; candidates are called `APP-VERSION`.
    """

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._handles: dict[str, Any] = {}
        self._answering: dict[str, Any] = {}  # the handles' `predict_packed`, once a replica has answered
        self._openings: dict[str, asyncio.Task[None]] = {}
        self._replicas: dict[str, int] = {}
        self._bereaved: set[str] = set()  # of which a replica has died, and nobody has looked yet how many are left
        self._questioned: set[str] = set()  # those of them that the last look was begun for
        self._has_news = asyncio.Event()
        self.liveness = Liveness(time.monotonic())

    def look(self) -> dict[str, tuple[str, int]]:
        """Ask the controller for our applications' status and running replicas, and get missing handles. Blocks."""
        self._questioned = set(self._bereaved)
        seen = {}
        for name, app in serve.status().applications.items():
            if name == self._app_name or name.startswith(f"{self._app_name}-"):
                running = self._running_in(name, app)
                seen[name] = (str(app.status.value), running)
                if running and name not in self._handles:
                    self._handles[name] = serve.get_app_handle(name)
        return seen

    def _running_in(self, name: str, app: Any) -> int:
        """Running replicas of an application.

        While Serve builds an application anew, from its first seconds on, it lists no deployments; but the replicas of
        before are there and answer.
        """
        if not app.deployments and app.status.value == "DEPLOYING":
            return self._replicas.get(name, 0)
        states = [deployment.replica_states for deployment in app.deployments.values()]
        return sum(counts.get(state, 0) for counts in states for state in _ANSWERING)

    def states(self, seen: dict[str, tuple[str, int]]) -> dict[str, AppState]:
        """Turn what was seen into states; an application is ready after a first call through its handle."""
        self._replicas = {name: replicas for name, (_, replicas) in seen.items()}
        self._judge_losses()
        for gone in self._handles.keys() - seen.keys():
            del self._handles[gone]  # another deployment may come back under this name
            self._answering.pop(gone, None)
        for name, replicas in self._replicas.items():
            if replicas and name in self._handles and name not in self._answering and name not in self._openings:
                self._openings[name] = asyncio.create_task(self._make_first_call(name, self._handles[name]))
        return {
            name: AppState(status, replicas, ready=replicas > 0 and name in self._answering and status != "DELETING")
            for name, (status, replicas) in seen.items()
        }

    def _judge_losses(self) -> None:
        """With its only replica gone an application answers nobody, though the controller has not noticed yet.

        The count must be one of after the loss: another replica may have come since the look before, and two that take
        turns in dying are no outage.
        """
        for app in self._questioned:
            if self._replicas.get(app, 0) <= 1:
                self._answering.pop(app, None)
        self._bereaved -= self._questioned
        self._questioned = set()

    async def _make_first_call(self, app: str, handle: Any) -> None:
        """Open the way to the replicas: the first call through a handle is slow, and may hang."""
        try:
            await asyncio.wait_for(_call(handle.get_stats), FIRST_ANSWER_TIMEOUT_S)
        except Exception as error:
            _log.warning("%s has replicas and does not answer yet: %s", app, type(error).__name__)
            return
        finally:
            del self._openings[app]
        if app in self._handles and self._handles[app] is handle:
            # Bytes and numbers need none of cloudpickle's powers, which cost time in every call.
            self._answering[app] = handle.options(
                method_name="predict_packed", request_serialization="pickle", response_serialization="pickle"
            )
        self.liveness.answered(time.monotonic())
        self._has_news.set()

    async def predict(self, predict: Predict, windows: bytes) -> bytes:
        """Have one replica answer the group.

        Raises:
            Exception: What Ray or the replica raises; `meaning` translates it.
        """
        if predict.app not in self._answering:
            raise NotReady("there is no such application")
        budget_s = predict.deadline - time.monotonic()
        try:
            async with asyncio.timeout(budget_s):
                packed = await self._predict_once(predict, windows)
        except RayActorError:
            self._lose_replica(predict.app)
            raise
        except ServingError:  # a refusal is an answer, too
            self.liveness.answered(time.monotonic())
            raise
        except (TimeoutError, DeploymentUnavailableError):
            self.liveness.unanswered(budget_s)
            raise
        except asyncio.CancelledError:
            if time.monotonic() >= predict.deadline:  # the gateway's timer was a little ahead of ours
                self.liveness.unanswered(budget_s)
            raise
        self.liveness.answered(time.monotonic())
        return packed

    async def _predict_once(self, predict: Predict, windows: bytes) -> bytes:
        budget_s = predict.deadline - time.monotonic()
        predict_packed = self._answering[predict.app]
        packed: bytes = await _call(predict_packed, windows, tuple(predict.options), budget_s, len(predict.passengers))
        return packed

    def _lose_replica(self, app: str) -> None:
        """A replica has died: have somebody look at once how many are left."""
        self._bereaved.add(app)
        self._has_news.set()

    async def wait_for_news(self, timeout_s: float) -> None:
        """Until a replica has died or answered for the first time, or for so long."""
        self._has_news.clear()
        await asyncio.sleep(NEWS_PAUSE_S)  # many calls bring the same news
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_news.wait(), timeout_s)

    async def stats(self) -> dict[str, Any]:
        """Each application's replicas' own counters; replicas that do not answer in time are missing."""
        apps = sorted(self._answering)
        rows = await asyncio.gather(*(self._replica_stats(app) for app in apps))
        return dict(zip(apps, rows, strict=True))

    async def _replica_stats(self, app: str) -> dict[str, Any]:
        try:
            answers = (
                await self._handles[app]
                .broadcast("get_stats")
                .results_async(timeout_s=STATS_TIMEOUT_S, return_exceptions=True)
            )
        except Exception as error:
            return {"replicas": [], "missing": meaning(error).code}
        return {"replicas": [row for row in answers if isinstance(row, dict)]}


async def _call(method: Any, *arguments: Any) -> Any:
    """Call a handle's method; cancelling the await cancels the replica's work, which it alone does not."""
    response = method.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):  # raises what the call had failed with, if it had
            response.cancel()
        raise


def meaning(error: BaseException) -> ServingError:
    """Translate what a handle call raised into an error of the contract, without its internals."""
    if isinstance(error, ServingError):
        return error
    for raised, means, detail in _MEANINGS:
        if isinstance(error, raised):
            return means(detail)
    if isinstance(error, RuntimeError) and str(error).startswith(_UNTOLD):
        return ReplicaLost("the connection to the replica broke")
    _log.error("a replica failed in an unforeseen way", exc_info=error)
    return ServingError("the model side failed")


class Bridge:
    """Joins the cluster and answers the gateway's frames.

    Args:
        address: `host:port` of the cluster's control store, or `auto`.
        app_name: Name of the default application.
    """

    def __init__(self, address: str, app_name: str) -> None:
        self._address = address
        self._cluster = Cluster(app_name)
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._gateway = FrameConnection(self._take, self._lose_gateway)
        self._gateway_is_gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, gateway: socket.socket) -> None:
        """Serve until the gateway is gone.

        Raises:
            Stranded: There is no way back to the cluster.
        """
        await asyncio.get_running_loop().create_unix_connection(lambda: self._gateway, sock=gateway)
        work = asyncio.create_task(self._join_and_watch())
        await asyncio.wait({work, self._gateway_is_gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()

    async def _join_and_watch(self) -> None:
        while not await self._is_reachable():
            self._push("no-cluster")
            await asyncio.sleep(STATUS_PERIOD_S)
        await self._join()
        await self._watch()

    async def _is_reachable(self) -> bool:
        """Whether something listens at the address: `ray.init` would wait for minutes to find out."""
        if self._address == "auto":
            return True
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(PORT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def _join(self) -> None:
        joining = asyncio.create_task(asyncio.to_thread(_init_ray, self._address))
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not joining.done():
            self._push("joining")
            if time.monotonic() > deadline:
                raise Stranded("the cluster did not let us join in time")
            await asyncio.wait({joining}, timeout=STATUS_PERIOD_S)
        try:
            joining.result()
        except Exception as error:
            raise Stranded(f"joining the cluster failed: {type(error).__name__}") from error

    async def _watch(self) -> None:
        liveness = self._cluster.liveness
        states: dict[str, AppState] = {}
        look: asyncio.Task[dict[str, tuple[str, int]]] | None = None
        while True:
            # One look at a time: with the control store away it hangs, and threads must not pile up behind it.
            look = look or asyncio.create_task(asyncio.to_thread(self._cluster.look))
            await asyncio.wait({look}, timeout=STATUS_PATIENCE_S)
            if look.done() and look.exception() is None:
                seen = look.result()
                liveness.saw(sum(replicas for _, replicas in seen.values()))
                states = self._cluster.states(seen)
            else:
                liveness.saw_nothing(time.monotonic())
            look = None if look.done() else look
            if reason := liveness.verdict(time.monotonic()):
                raise Stranded(reason)
            self._push("joined", states)
            is_settled = states and all(state.ready for state in states.values())
            await self._cluster.wait_for_news(SETTLED_PERIOD_S if is_settled else STATUS_PERIOD_S)

    def _push(self, state: str, apps: dict[str, AppState] | None = None) -> None:
        self._gateway.send(Kind.STATUS, 0, {"state": state, "apps": apps or {}})

    def _take(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.PREDICT:
                self._start(frame.call_id, self._predict(frame.call_id, Predict.of_frame(frame), frame.payload))
            case Kind.STATS:
                self._start(frame.call_id, self._stats(frame.call_id))
            case Kind.CANCEL:
                if call := self._calls.get(frame.call_id):
                    call.cancel()
            case _:
                raise FrameError(f"a gateway does not send {frame.kind.name}")

    def _start(self, call_id: int, work: Any) -> None:
        self._calls[call_id] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._calls.pop(call_id, None))

    async def _predict(self, call_id: int, predict: Predict, windows: bytes) -> None:
        try:
            packed = await self._cluster.predict(predict, windows)
        except Exception as error:
            failure = meaning(error)
            self._gateway.send(Kind.ERROR, call_id, {"code": failure.code, "detail": failure.detail})
        else:
            self._gateway.send(Kind.RESULT, call_id, {}, memoryview(packed))

    async def _stats(self, call_id: int) -> None:
        self._gateway.send(Kind.RESULT, call_id, await self._cluster.stats())

    def _lose_gateway(self, reason: Exception | None) -> None:
        if reason is not None:
            _log.error("the connection to the gateway broke: %s", reason)
        if not self._gateway_is_gone.done():
            self._gateway_is_gone.set_result(None)


def _init_ray(address: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    gc.freeze()  # Ray is here to stay: a full collection need not walk over all of it


async def _serve(arguments: argparse.Namespace) -> NoReturn:
    bridge = Bridge(arguments.address, arguments.app)
    code = 0
    try:
        await bridge.run(socket.socket(fileno=arguments.fd))
    except Stranded as reason:
        _log.error("ending, to be started again: %s", reason)
        code = EX_TEMPFAIL
    os._exit(code)  # from inside the loop: its end would wait for threads, and one may hang inside Ray for ever


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app.backends.bridge", description="The gateway's Ray driver.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the gateway")
    parser.add_argument("--address", required=True, help="host:port of the cluster, or auto")
    parser.add_argument("--app", required=True, help="name of the default Serve application")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
