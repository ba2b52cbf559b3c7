"""The backend `legacy`: the same engine in this process, for the old path and for the time without Ray.

The engine lives on one thread of its own, which imports torch, loads the model, warms it up and runs every forward
pass; the event loop never waits for any of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.backends.base import Answer, BackendStatus, Call
from app.backends.coalesce import Coalescer, Group
from serve_app.contract import ModelFailed, ModelNotFound, NotReady, Prediction, ServingError

if TYPE_CHECKING:
    from serve_app.engine import Engine

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0


class LoadFailed(Exception):
    """No engine came of it.

    Args:
        reason: A key of `_OBSTACLES`, the closed set that `status` may show.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def load_from_registry(
    registry_path: Path, *, model: str, version: str, engine: str, device: str, threads: int
) -> Engine:
    """Load a verified version into an engine; imports torch, so call it on the thread that can wait.

    Args:
        registry_path: Root of the registry.
        model: Name in the registry.
        version: Version or alias.
        engine: Name in the table of engines.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of one forward pass.

    Raises:
        LoadFailed: With the reason.
    """
    # Here and not above: torch takes seconds to import, and the gateway listens before.
    from serve_app.engine import WITHOUT_ARTEFACT, load_engine  # noqa: PLC0415
    from serve_app.registry import (  # noqa: PLC0415
        ArtefactRejected,
        Registry,
        RegistryError,
        VersionNotFound,
    )

    try:
        artefact = None if engine in WITHOUT_ARTEFACT else Registry(registry_path).load(model, version)
        return load_engine(artefact, engine=engine, device=device, threads=threads)
    except VersionNotFound as error:
        raise LoadFailed("version-not-found", str(error)) from error
    except ArtefactRejected as error:
        raise LoadFailed("artefact-rejected", str(error)) from error
    except (RegistryError, ValueError) as error:
        raise LoadFailed("load-failed", str(error)) from error


class InProcessBackend:
    """Predictions from an engine in this process; calls that wait for the forward pass under way share the next one.

    Args:
        load: Gives the engine; called on the engine's thread, and again with a growing pause while it fails.
        max_group_windows: Most windows of one forward pass.
        max_queued_windows: Most windows that may wait.
        clock: Seconds, monotonic.
    """

    name = "legacy"

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        max_group_windows: int = 32,
        max_queued_windows: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._coalescer = Coalescer(
            self._send,
            max_group_windows=max_group_windows,
            max_in_flight=1,
            max_queued_windows=max_queued_windows,
            clock=clock,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._engine: Engine | None = None
        self._reason = "loading"
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loading = asyncio.create_task(self._load_until_it_works())

    async def stop(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        self._coalescer.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def predict(self, call: Call) -> Answer:
        if self._engine is None:
            raise NotReady(_OBSTACLES[self._reason])
        if call.version not in (None, self._engine.model_version):
            raise ModelNotFound("this arm serves another version")
        return await self._coalescer.predict(call)

    def status(self) -> BackendStatus:
        return BackendStatus(self._engine is not None, self._reason, self._describe())

    async def stats(self) -> dict[str, Any]:
        return {**self._describe(), "gateway": self._coalescer.stats()}

    def _describe(self) -> dict[str, Any]:
        engine = self._engine
        if engine is None:
            return {}
        return {
            "engine": engine.name,
            "device": engine.device,
            "model_name": engine.model_name,
            "model_version": engine.model_version,
            "n_params": engine.n_params,
        }

    async def _load_until_it_works(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while self._engine is None:
            try:
                self._engine = await asyncio.get_running_loop().run_in_executor(self._thread, self._load_and_warm_up)
                self._reason = "ok"
            except Exception as error:
                self._reason = error.reason if isinstance(error, LoadFailed) else "load-failed"
                _log.error("the model cannot be loaded, next try in %.0f s", backoff_s, exc_info=error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _load_and_warm_up(self) -> Engine:
        engine = self._load()
        engine.warm_up()
        return engine

    async def _send(self, group: Group) -> Prediction:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, group)

    def _forward(self, group: Group) -> Prediction:
        assert self._engine is not None
        batches = [part.windows for part in group.parts]
        windows = batches[0] if len(batches) == 1 else np.concatenate(batches)
        try:
            return self._engine.predict(windows, group.options)
        except ServingError:
            raise
        except Exception as error:
            _log.exception("the forward pass raised")
            raise ModelFailed("the forward pass failed") from error


_OBSTACLES = {
    "loading": "the model is being loaded",
    "version-not-found": "the registry has no such version",
    "artefact-rejected": "the registry's version is damaged or of another kind",
    "load-failed": "the model cannot be loaded",
}
