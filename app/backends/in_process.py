"""The backend `legacy`: the same engine in this process, for the old path and for the time without Ray.

Two threads beside the event loop, which never waits for either: one imports torch, loads models and warms them up, the
other runs every forward pass. So a version that is being loaded holds up no answer of those that are there.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from app.backends.base import MAX_CALL_WINDOWS, Answer, BackendStatus, Call
from app.backends.coalesce import Coalescer, Group
from app.backends.model_cache import ModelCache, NoRoom
from serve_app.contract import ModelFailed, ModelNotFound, NotReady, Prediction, ServingError

if TYPE_CHECKING:
    from serve_app.engine import Engine

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_SWEEP_S = 60.0
MAX_REFUSED = 64  # versions whose failed load is remembered

T = TypeVar("T")


class LoadFailed(Exception):
    """No engine came of it.

    Args:
        reason: A key of `_OBSTACLES`, the closed set that `status` may show.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Refusal(NamedTuple):
    """How loading a version ended, and until when it is not tried again."""

    error: ServingError
    until: float


class Source(Protocol):
    """Where engines come from. Its methods block: they run on the loading thread."""

    def load(self, version: str | None) -> Engine:
        """A version, or the default one, loaded and warm. Raises `LoadFailed`."""

    def aliased(self) -> frozenset[str]:
        """Versions that an alias stands for now. Raises `LoadFailed`."""

    def release(self, device: str) -> None:
        """Clean up after engines on that device were let go."""


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """Engines from verified versions of the registry; the first use imports torch.

    Attributes:
        registry_path: Root of the registry.
        model: Name in the registry.
        version: Version or alias of the default.
        engine: Name in the table of engines.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of one forward pass.
        key_file: Public key; where given, unsigned versions are refused.
        exact: Answers whose bits do not depend on batch mates, at a price.
        fault_file: What the engine `faulty` is told by.
    """

    registry_path: Path
    model: str
    version: str
    engine: str
    device: str
    threads: int
    key_file: Path | None = None
    exact: bool = False
    fault_file: Path | None = None

    def load(self, version: str | None) -> Engine:
        # Here and not above: torch takes seconds to import, and the gateway listens before.
        from serve_app.engine import WITHOUT_ARTEFACT, load_engine  # noqa: PLC0415
        from serve_app.engine.halving import HalvingEngine  # noqa: PLC0415
        from serve_app.registry import open_registry  # noqa: PLC0415

        with _failures_told():
            artefact = None
            if self.engine not in WITHOUT_ARTEFACT:
                registry = open_registry(self.registry_path, key_file=self.key_file)
                artefact = registry.load(self.model, version or self.version)
            engine = load_engine(
                artefact,
                engine=self.engine,
                device=self.device,
                threads=self.threads,
                exact=self.exact,
                fault_file=self.fault_file,
            )
        engine.warm_up()
        gc.collect()  # or the freeze would keep what only waits to be collected: a trace leaves the model so
        gc.freeze()  # what torch brought is here to stay: a full collection would walk over all of it, for 0.1 s
        return HalvingEngine(engine)

    def aliased(self) -> frozenset[str]:
        from serve_app.registry import Registry  # noqa: PLC0415

        with _failures_told():
            return frozenset(Registry(self.registry_path).aliases(self.model).values())

    def release(self, device: str) -> None:
        from serve_app.cuda import release_memory  # noqa: PLC0415

        release_memory(device)


@contextmanager
def _failures_told() -> Iterator[None]:
    """What the registry and the engine raise, as `LoadFailed` with its reason."""
    from serve_app.registry import ArtefactRejected, RegistryError, VersionNotFound  # noqa: PLC0415

    try:
        yield
    except VersionNotFound as error:
        raise LoadFailed("version-not-found", str(error)) from error
    except ArtefactRejected as error:
        raise LoadFailed("artefact-rejected", str(error)) from error
    except (RegistryError, ValueError) as error:
        raise LoadFailed("load-failed", str(error)) from error


class InProcessBackend:
    """Predictions from engines in this process; calls that wait for the forward pass under way share the next one.

    The default version is loaded at the start and stays. Another one is loaded when a call first names it: that call
    and those that come meanwhile fail at once with `NotReady`, and nobody else waits for it.

    Args:
        source: Gives engines; the default one is asked for again with a growing pause while that fails.
        cache_size: Most versions in memory, the default among them.
        cache_ttl_s: Seconds without a call after which a version without alias is let go.
        max_group_windows: Most windows of one forward pass.
        max_queued_windows: Most windows that may wait before a call and with it.
        max_wait_s: Longest wait for a slot that a call is admitted to.
        clock: Seconds, monotonic.
    """

    name = "legacy"

    def __init__(
        self,
        source: Source,
        *,
        cache_size: int = 3,
        cache_ttl_s: float = 3600.0,
        max_group_windows: int = 32,
        max_queued_windows: int = MAX_CALL_WINDOWS,
        max_wait_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._cache = ModelCache(size=cache_size, ttl_s=cache_ttl_s, clock=clock)
        self._cache_size = cache_size
        self._sweep_s = min(cache_ttl_s / 4, MAX_SWEEP_S)
        self._clock = clock
        self._coalescer = Coalescer(
            self._send,
            max_group_windows=max_group_windows,
            max_in_flight=1,
            max_queued_windows=max_queued_windows,
            max_wait_s=max_wait_s,
            clock=clock,
        )
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._default: str | None = None
        self._reason = "loading"
        self._one_at_a_time = asyncio.Lock()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._refused: OrderedDict[str, _Refusal] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._load_until_it_works()), asyncio.create_task(self._sweep())]

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._coalescer.close()
        for thread in (self._loader, self._thread):
            thread.shutdown(wait=False, cancel_futures=True)

    async def predict(self, call: Call) -> Answer:
        if self._default is None:
            raise NotReady(_OBSTACLES[self._reason])
        version = call.version or self._default
        if version not in self._cache:
            self._begin_loading(version)
            raise NotReady("that version is being loaded")
        with self._cache.using(version):
            return await self._coalescer.predict(call)

    def is_ready(self, version: str | None = None) -> bool:
        return self._default is not None and (version is None or version in self._cache)

    def status(self) -> BackendStatus:
        versions = None if self._default is None else frozenset(self._cache.versions)
        return BackendStatus(self._default is not None, self._reason, self._describe(), versions)

    async def stats(self) -> dict[str, Any]:
        return {**self._describe(), "gateway": self._coalescer.stats()}

    def _describe(self) -> dict[str, Any]:
        if self._default is None:
            return {}
        engine = self._cache[self._default]
        return {
            "engine": engine.name,
            "engine_remark": engine.remark,
            "device": engine.device,
            "model_name": engine.model_name,
            "model_version": engine.model_version,
            "n_params": engine.n_params,
            "versions_in_memory": self._cache.versions,
        }

    # --- loading ------------------------------------------------------------------------------------------------

    async def _load_until_it_works(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while self._default is None:
            try:
                self._default = await self._load(None)
                self._reason = "ok"
            except Exception as error:
                self._reason = _reason_of(error)
                _log.error("the model cannot be loaded, next try in %.0f s", backoff_s, exc_info=error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _begin_loading(self, version: str) -> None:
        """Load a version aside. Raises what a recent try ended with, or `NotReady` when enough are being loaded."""
        if version in self._loading:
            return
        refusal = self._refused.get(version)
        if refusal is not None and self._clock() < refusal.until:
            raise type(refusal.error)(refusal.error.detail)
        if len(self._loading) >= self._cache_size:
            raise NotReady("other versions are being loaded")
        task = self._loading[version] = asyncio.create_task(self._load_or_refuse(version))
        task.add_done_callback(lambda _: self._loading.pop(version))

    async def _load_or_refuse(self, version: str) -> None:
        error: ServingError
        try:
            if await self._load(version) == version:
                self._refused.pop(version, None)
                return
            error = ModelNotFound("an arm names a version, never an alias")
        except NoRoom:
            error = NotReady("no room for another version: those in memory are in use or have an alias")
        except Exception as failure:
            reason = _reason_of(failure)
            _log.error("version %s cannot be loaded", version, exc_info=failure)
            error = (ModelNotFound if reason == "version-not-found" else NotReady)(_OBSTACLES[reason])
        self._refused[version] = _Refusal(error, self._clock() + MAX_BACKOFF_S)
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    async def _load(self, version: str | None) -> str:
        """Load one version, after those asked for before it; returns its name. Nobody's forward pass waits for it."""
        async with self._one_at_a_time:
            if self._cache.versions:
                await self._refresh_aliases()
                await self._let_go(self._cache.make_room())
            engine = await self._aside(self._source.load, version)
            if engine.model_version not in self._cache:
                self._cache.put(engine)
            return engine.model_version

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            await self.expire()

    async def expire(self) -> None:
        """Let go of versions that were idle for too long; the sweep's one step."""
        async with self._one_at_a_time:
            if len(self._cache.versions) > 1 and await self._refresh_aliases():
                await self._let_go(self._cache.expire())

    async def _refresh_aliases(self) -> bool:
        """Ask for the versions with an alias; where that fails, those known before stay as they are."""
        default = frozenset(() if self._default is None else (self._default,))
        try:
            self._cache.aliased = default | await self._aside(self._source.aliased)
        except Exception as error:
            _log.warning("the registry's aliases cannot be read", exc_info=error)
            return False
        return True

    async def _let_go(self, engines: list[Engine]) -> None:
        devices = {engine.device for engine in engines}
        engines.clear()  # the clean-up frees only what nobody refers to
        for device in devices:
            await self._aside(self._source.release, device)

    async def _aside(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, function, *args)

    # --- the forward pass ---------------------------------------------------------------------------------------

    async def _send(self, group: Group) -> Prediction:
        assert self._default is not None
        engine = self._cache[group.version or self._default]
        return await asyncio.get_running_loop().run_in_executor(self._thread, _forward, engine, group)


def _forward(engine: Engine, group: Group) -> Prediction:
    batches = [part.windows for part in group.parts]
    windows = batches[0] if len(batches) == 1 else np.concatenate(batches)
    try:
        return engine.predict(windows, group.options)
    except ServingError:
        raise
    except Exception as error:
        _log.exception("the forward pass raised")
        raise ModelFailed("the forward pass failed") from error


def _reason_of(error: Exception) -> str:
    return error.reason if isinstance(error, LoadFailed) else "load-failed"


_OBSTACLES = {
    "loading": "the model is being loaded",
    "version-not-found": "the registry has no such version",
    "artefact-rejected": "the registry's version is damaged or of another kind",
    "load-failed": "the model cannot be loaded",
}
