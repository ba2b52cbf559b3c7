"""The engine `auto`: several engines loaded, a short race, the quickest kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from serve_app.contract import N_FEATURES, N_STEPS, FloatArray
from serve_app.engine.base import EVERYTHING, Engine, Setup
from serve_app.model import Mixture
from serve_app.registry import Artefact

logger = logging.getLogger(__name__)

RACED_BATCHES = (1, 32)  # the two sizes that latency and throughput live at
EXACT_BATCHES = (1,)  # the only one that the exact mode runs
LAPS = 15
WARM_UP_LAPS = 5
MAX_DIFFERENCE = 1e-5

Loader = Callable[[Artefact, Setup], Engine]
Times = dict[str, tuple[float, ...]]


def load_quickest(
    loaders: Mapping[str, Loader], artefact: Artefact, setup: Setup, clock: Callable[[], float] = time.perf_counter
) -> Engine:
    """Load several engines, time them in turns and keep the one with the least geometric mean of its times.

    The times are per window, each the best of ten laps, at batches of 1 and 32; for the exact mode at 1 alone. What was
    chosen and why is logged, and stands in the engine's `remark`. An engine that cannot be loaded or run, or answers
    otherwise than the first, does not take part.

    Args:
        loaders: By name, at least one; the first is the one to trust.
        artefact: The model.
        setup: How it is to run.
        clock: Seconds, monotonic.

    Raises:
        ArtefactRejected: As the loaders.
    """
    engines = _load_all(loaders, artefact, setup)
    batches = EXACT_BATCHES if setup.exact else RACED_BATCHES
    times = race(engines, batches, clock)
    chosen = min(times, key=lambda name: math.prod(times[name]))
    sizes = " and ".join(map(str, batches))
    figures = ", ".join(f"{name} {' and '.join(f'{ms:.3f}' for ms in times[name])}" for name in times)
    engines[chosen].remark = f"auto, ms per window at batches of {sizes}: {figures}"
    logger.info("engine %s chosen; %s", chosen, engines[chosen].remark)
    return engines[chosen]


def _load_all(loaders: Mapping[str, Loader], artefact: Artefact, setup: Setup) -> dict[str, Engine]:
    (first, load_first), *others = loaders.items()
    engines = {first: load_first(artefact, setup)}
    for name, load in others:
        try:
            engine = load(artefact, setup)
            agrees = _agree(engines[first], engine)
        except Exception:  # what a library raises over a graph that it does not know is a closed set to nobody
            logger.exception("engine %s cannot be loaded or run and is left out", name)
            continue
        if agrees:
            engines[name] = engine
        else:
            logger.error("engine %s answers otherwise than %s and is left out", name, first)
    return engines


def _agree(engine: Engine, other: Engine) -> bool:
    windows = np.random.default_rng(0).standard_normal((4, N_FEATURES, N_STEPS), dtype=np.float32)
    ours, theirs = engine.predict(windows, EVERYTHING), other.predict(windows, EVERYTHING)
    return all(
        np.allclose(getattr(ours, field), getattr(theirs, field), rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE)
        for field in (*Mixture._fields, "ensemble_weights")
    )


def race(engines: Mapping[str, Engine], batches: Iterable[int], clock: Callable[[], float]) -> Times:
    """Milliseconds per window at each batch size, in turns, so that a slow moment meets all.

    The best lap, because what other processes take from this one is not the engine's.
    """
    times: Times = dict.fromkeys(engines, ())
    random = np.random.default_rng(0)
    for size in batches:
        windows = random.standard_normal((size, N_FEATURES, N_STEPS), dtype=np.float32)
        laps = [{name: _lap_s(engine, windows, clock) for name, engine in engines.items()} for _ in range(LAPS)]
        for name in engines:
            times[name] += (1000 * min(lap[name] for lap in laps[WARM_UP_LAPS:]) / size,)
    return times


def _lap_s(engine: Engine, windows: FloatArray, clock: Callable[[], float]) -> float:
    started = clock()
    engine.predict(windows, EVERYTHING)
    return clock() - started
