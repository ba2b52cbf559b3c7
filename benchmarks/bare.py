"""The bare engine: what one core does when nothing but the model runs on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from app.bench.report import describe_ms
from benchmarks.peers.catalogue import Model
from serve_app.contract import FloatArray, Options
from serve_app.engine import WITHOUT_ARTEFACT, Engine, load_engine
from serve_app.registry import Registry

BATCHES = (1, 32)


def load_bare(model: Model) -> Engine:
    """The engine of a model, warm, on one thread."""
    artefact = None if model.engine in WITHOUT_ARTEFACT else Registry(model.registry).load(model.name)
    engine = load_engine(artefact, engine=model.engine, threads=1)
    engine.warm_up()
    return engine


def time_bare(
    engine: Engine, windows: FloatArray, *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Call an engine in a hot loop.

    Args:
        engine: A warm one.
        windows: float32[B,F,T], the batch of every call.
        seconds: How long.
        clock: Monotonic seconds.

    Returns:
        `batch`, `windows_per_s` and `latency_ms` of the calls.
    """
    times_s: list[float] = []
    options = Options()
    began = clock()
    while clock() - began < seconds:
        started = clock()
        engine.predict(windows, options)
        times_s.append(clock() - started)
    return {
        "batch": len(windows),
        "windows_per_s": len(windows) * len(times_s) / sum(times_s),
        "latency_ms": describe_ms(times_s),
    }
