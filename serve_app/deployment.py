"""The Ray Serve deployment: a replica holds one engine, feeds it from a drain-when-free queue and reports on itself."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray import serve
from ray.serve import Application
from ray.serve._private import replica as replica_internals

from serve_app.autoscaling import WINDOWS_ONGOING
from serve_app.batching import DrainQueue
from serve_app.contract import (
    N_FEATURES,
    N_STEPS,
    WINDOW_BYTES,
    FloatArray,
    InvalidWindows,
    NotReady,
    Options,
    Prediction,
    ServingError,
    as_windows,
)
from serve_app.cuda import memory_report, release_memory, utilization_percent
from serve_app.engine import WITHOUT_ARTEFACT, Engine, load_engine
from serve_app.engine.halving import HalvingEngine, Shortages
from serve_app.registry import RegistryError, open_registry
from serve_app.serve_config import DEPLOYMENT_NAME, MAX_ONGOING_REQUESTS, QueueLimits, ServedModel

logger = logging.getLogger("ray.serve")

DEFAULT_BUDGET_S = 2.0  # of a call that names none


class ReplicaUnfit(Exception):
    """The model makes no progress while work waits, or has no memory for it; Serve replaces the replica."""


@serve.deployment(
    name=DEPLOYMENT_NAME, user_config=ServedModel().model_dump(), max_ongoing_requests=MAX_ONGOING_REQUESTS
)
class CNNLSTMPredictor:
    """One replica. `reconfigure` names the model version and changes it in place, without a new process.

    Args:
        limits: Fields of `QueueLimits`; unknown ones are refused.
    """

    def __init__(self, **limits: Any) -> None:
        _listen_on_node_address_only()
        self._limits = QueueLimits(**limits)
        self._queue = DrainQueue(
            max_batch_windows=self._limits.max_batch_windows,
            max_queue_windows=self._limits.max_queue_windows,
            inline_windows=self._limits.inline_windows,
        )
        self._replica_id = str(serve.get_replica_context().replica_id.unique_id)
        self._clock: Callable[[], float] = time.monotonic
        self._engine: Engine | None = None
        self._served: ServedModel | None = None
        self._rejected: dict[str, str] | None = None
        self._loading = asyncio.Lock()
        self._shortages = Shortages()
        self._requests = self._windows = 0
        self._processing_s = 0.0
        self._errors: Counter[str] = Counter()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve what `user_config` names: load and warm it aside, then swap one reference.

        Calls that came before the swap are answered by the version they came for. Serve calls this again with an
        unchanged configuration at times, which does nothing. When loading fails, the old version serves on, or the
        standby in a replica that has none yet, and `get_stats` names what was rejected and why; without either this
        raises, and the replica never becomes ready.
        """
        served = ServedModel.model_validate(user_config)
        async with self._loading:
            if _same(served, self._served):
                self._rejected = None  # whoever asks for the old version again has taken the other one back
                return
            try:
                engine = await asyncio.to_thread(_load, served, self._shortages)
            except Exception as error:
                await self._stand_by(served, error)
                return
            if self._engine is not None:
                _release_when_unused(self._engine)
            self._engine, self._served, self._rejected = engine, served, None
        logger.info(
            "%s serves %s version %s on device %s with the %s engine, %d parameters",
            *(DEPLOYMENT_NAME, engine.model_name, engine.model_version, engine.device, engine.name, engine.n_params),
        )

    async def __call__(
        self,
        data: npt.NDArray[Any],
        return_uncertainty: bool = True,
        use_ensemble: bool = True,
        return_features: bool = False,
    ) -> dict[str, Any]:
        """Answer one array, for callers that hold a handle themselves.

        Args:
            data: Numbers of shape (F, T) or (B, F, T) with F=50, T=60.
            return_uncertainty: Answer the uncertainty arrays as well.
            use_ensemble: Mix the members; otherwise the fusion head answers alone.
            return_features: Answer the fused features as well.

        Returns:
            The fields of `Prediction` as arrays with a leading axis B, None where not asked for, and
            `processing_time_ms`, what the caller waited here.

        Raises:
            ServingError: As `predict_packed`.
        """
        started = self._clock()
        options = Options(return_uncertainty, use_ensemble, return_features)
        async with self._counted(n_requests=1):
            if not isinstance(data, np.ndarray):
                raise InvalidWindows("data must be a numpy array")
            prediction = await self._predict(as_windows(data), options, started + DEFAULT_BUDGET_S)
            prediction.check()
        answer = {name: getattr(prediction, name) for name in Prediction.__dataclass_fields__}
        return {**answer, "processing_time_ms": (self._clock() - started) * 1000}

    async def predict_packed(
        self, windows: bytes, options: tuple[bool, bool, bool], budget_s: float, n_requests: int = 1
    ) -> bytes:
        """Answer a group of windows that the gateway has put together.

        The values are not checked for being an acceptable answer: the group may hold several requests, and a
        window that the model answers with NaN must fail its own request only.

        Args:
            windows: Little-endian float32[N,F,T].
            options: Fields of `Options`.
            budget_s: Seconds from now after which nobody waits for the answer.
            n_requests: Requests that the group holds, for the counters.

        Returns:
            `Prediction.pack()` of all N windows.

        Raises:
            InvalidWindows: The bytes are no windows, or hold values that the model does not take.
            NotReady, Overloaded, DeadlineExceeded, OutOfMemory, ModelFailed: As the names say.
        """
        deadline = self._clock() + budget_s
        async with self._counted(n_requests):
            prediction = await self._predict(_unpack(windows), Options(*options), deadline)
        return prediction.pack()

    async def get_stats(self) -> dict[str, Any]:
        """This replica's counters and state, JSON-ready."""
        engine = self._engine
        return {
            "replica_id": self._replica_id,
            "request_count": self._requests,
            "window_count": self._windows,
            "avg_processing_time_ms": self._processing_s * 1000 / self._requests if self._requests else 0.0,
            "queued_windows": self._queue.waiting_windows,
            "errors": dict(self._errors),
            "device": engine.device if engine else None,
            "engine": engine.name if engine else None,
            "engine_remark": engine.remark if engine else None,
            "model_name": engine.model_name if engine else None,
            "model_version": engine.model_version if engine else None,
            "n_params": engine.n_params if engine else None,
            "rejected": self._rejected,
            "memory": memory_report(engine.device if engine else "cpu"),
            **(_gpu_figures(engine.device) if engine else {}),
        }

    async def check_health(self) -> None:
        """Raise when the model makes no progress although there is work for it, or has often had no memory of late."""
        if self._shortages.are_many:
            raise ReplicaUnfit("the model's device was out of memory again and again")
        if self._queue.stalled_s > self._limits.stall_s:
            raise ReplicaUnfit(f"no batch was finished for {self._queue.stalled_s:.1f} s while calls waited")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy reads."""
        return {WINDOWS_ONGOING: self._queue.mean_windows()}

    async def _predict(self, windows: FloatArray, options: Options, deadline: float) -> Prediction:
        if self._engine is None:
            raise NotReady("the model is still loading")
        prediction = await self._queue.predict(self._engine, windows, options, deadline=deadline)
        self._windows += len(windows)
        return prediction

    @asynccontextmanager
    async def _counted(self, n_requests: int) -> AsyncIterator[None]:
        started = self._clock()
        try:
            yield
        except ServingError as error:
            self._errors[error.code] += n_requests
            raise
        self._requests += n_requests
        self._processing_s += (self._clock() - started) * n_requests

    async def _stand_by(self, served: ServedModel, error: Exception) -> None:
        """Serve what there is instead of a version that cannot be loaded; raises its error where there is nothing."""
        if self._engine is None:
            if served.standby is None:
                raise error
            standby = served.model_copy(update={"version": served.standby})
            self._engine = await asyncio.to_thread(_load, standby, self._shortages)
            self._served = standby
        self._reject(served, error)

    def _reject(self, served: ServedModel, error: Exception) -> None:
        reason = str(error) if isinstance(error, RegistryError | ValueError) else type(error).__name__
        self._rejected = {"model": served.model, "version": served.version, "reason": reason}
        logger.error("rejected %s version %s, the old one serves on: %s", served.model, served.version, reason)


def build(args: dict[str, Any]) -> Application:
    """The application, for the Serve configuration's `import_path`.

    Args:
        args: Fields of `QueueLimits`.

    Raises:
        ValueError: An unknown field, or one out of range.
    """
    # mypy takes a decorated class for the class itself; Serve made a deployment of it.
    return CNNLSTMPredictor.bind(**QueueLimits(**args).model_dump())  # type: ignore[attr-defined]


cnn_lstm_deployment = build({})


def _load(served: ServedModel, shortages: Shortages) -> Engine:
    artefact = None
    if served.engine not in WITHOUT_ARTEFACT:
        key_file = None if served.registry_key_path is None else Path(served.registry_key_path)
        artefact = open_registry(Path(served.registry_path), key_file=key_file).load(served.model, served.version)
    engine = load_engine(
        artefact,
        engine=served.engine,
        device=served.device,
        threads=served.threads,
        gpu_share=served.gpu_share,
        exact=served.exact,
        fault_file=None if served.fault_file is None else Path(served.fault_file),
    )
    engine.warm_up()
    return HalvingEngine(engine, shortages)


def _same(served: ServedModel, other: ServedModel | None) -> bool:
    """Whether both are the same to serve: a standby is none of it."""
    return other is not None and served == other.model_copy(update={"standby": served.standby})


def _release_when_unused(engine: Engine) -> None:
    """Give a replaced model's memory back to the GPU once the last call that came for it is answered."""
    loop = asyncio.get_running_loop()
    weakref.finalize(engine, loop.call_soon_threadsafe, release_memory, engine.device).atexit = False


def _gpu_figures(device: str) -> dict[str, Any]:
    """Which GPU this replica is on and how busy that is; nothing on cpu."""
    percent = utilization_percent(device)
    if percent is None:
        return {}
    ids = ray.get_runtime_context().get_accelerator_ids().get("GPU") or ["0"]
    return {"gpu_id": f"{ray.util.get_node_ip_address()}/{ids[0]}", "gpu_utilization_percent": percent}


def _unpack(data: bytes) -> FloatArray:
    if not data or len(data) % WINDOW_BYTES:
        raise InvalidWindows(f"a window is {WINDOW_BYTES} bytes")
    return as_windows(np.frombuffer(data, "<f4").reshape(-1, N_FEATURES, N_STEPS))


def _listen_on_node_address_only() -> None:
    """Keep the port on which handles reach this replica off every other address of the host.

    Serve binds it to all of them and has no setting for it; handles use the node's address, which is loopback for
    a local Ray. Serve opens the port after the replica was built. Should a new Ray change this, replicas fail to
    start rather than listen to the world.
    """
    bind = replica_internals.add_port_to_grpc_server
    address = f"{ray.util.get_node_ip_address()}:0"
    replica_internals.add_port_to_grpc_server = lambda server, _: bind(server, address)
