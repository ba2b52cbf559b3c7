"""The engine `auto`: several engines loaded, a short race, the quickest kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np

from serve_app.contract import N_FEATURES, N_STEPS, FloatArray
from serve_app.engine.base import EVERYTHING, Engine, Setup
from serve_app.registry import Artefact

logger = logging.getLogger(__name__)

RACED_BATCHES = (1, 32)  # the two sizes that latency and throughput live at
LAPS = 15
WARM_UP_LAPS = 5

Loader = Callable[[Artefact, Setup], Engine]
Times = dict[str, tuple[float, ...]]


def load_quickest(
    loaders: Mapping[str, Loader], artefact: Artefact, setup: Setup, clock: Callable[[], float] = time.perf_counter
) -> Engine:
    """Load several engines, time them in turns and keep the one with the least geometric mean of its times.

    The times are medians per window, at batches of 1 and 32. What was chosen and why is logged, and stands in the
    engine's `remark`.

    Args:
        loaders: By name; at least one.
        artefact: The model.
        setup: How it is to run.
        clock: Seconds, monotonic.

    Raises:
        ArtefactRejected: As the loaders.
    """
    engines = {name: load(artefact, setup) for name, load in loaders.items()}
    times = race(engines, clock)
    chosen = min(times, key=lambda name: math.prod(times[name]))
    engines[chosen].remark = "auto: " + ", ".join(f"{name} {_figures(times[name])}" for name in times)
    logger.info("engine %s chosen for %s; %s", chosen, artefact.version, engines[chosen].remark)
    return engines[chosen]


def race(engines: Mapping[str, Engine], clock: Callable[[], float]) -> Times:
    """Milliseconds per window at each of `RACED_BATCHES`, medians; in turns, so that a slow moment meets all."""
    times: Times = dict.fromkeys(engines, ())
    random = np.random.default_rng(0)
    for size in RACED_BATCHES:
        windows = random.standard_normal((size, N_FEATURES, N_STEPS), dtype=np.float32)
        laps = [{name: _lap_s(engine, windows, clock) for name, engine in engines.items()} for _ in range(LAPS)]
        for name in engines:
            times[name] += (1000 * median(lap[name] for lap in laps[WARM_UP_LAPS:]) / size,)
    return times


def _lap_s(engine: Engine, windows: FloatArray, clock: Callable[[], float]) -> float:
    started = clock()
    engine.predict(windows, EVERYTHING)
    return clock() - started


def _figures(times: tuple[float, ...]) -> str:
    pairs = zip(times, RACED_BATCHES, strict=True)
    return " and ".join(f"{ms:.3f}" for ms, _ in pairs) + " ms per window"
