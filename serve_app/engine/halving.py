"""What becomes of a batch for which there is no memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from serve_app.contract import FloatArray, Options, OutOfMemory, Prediction
from serve_app.cuda import OUT_OF_MEMORY, release_memory
from serve_app.engine.base import Engine

MANY = 3
WINDOW_S = 60.0


class Shortages:
    """When memory was short: once may be chance, often is a leak that a new process does not have.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: deque[float] = deque(maxlen=MANY)

    def note(self) -> None:
        """A batch was given up."""
        self._last.append(self._clock())

    @property
    def are_many(self) -> bool:
        """Three within a minute."""
        return len(self._last) == MANY and self._clock() - self._last[0] <= WINDOW_S


class HalvingEngine:
    """Another engine; a batch that finds no memory is run once more in two halves, and then given up.

    Args:
        engine: What answers.
        shortages: Told of each batch that was given up.
    """

    def __init__(self, engine: Engine, shortages: Shortages | None = None) -> None:
        self._engine = engine
        self._shortages = shortages or Shortages()
        self.name = engine.name
        self.device = engine.device
        self.model_name = engine.model_name
        self.model_version = engine.model_version
        self.n_params = engine.n_params
        self.remark = engine.remark

    def warm_up(self) -> None:
        self._engine.warm_up()

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        """As the engine.

        Raises:
            OutOfMemory: There is no memory for half of the batch either, or it is one window.
        """
        answer = self._try(windows, options)
        return self._predict_halves(windows, options) if answer is None else answer

    def _predict_halves(self, windows: FloatArray, options: Options) -> Prediction:
        middle = (len(windows) + 1) // 2
        answers = []
        for half in (windows[:middle], windows[middle:]):
            release_memory(self.device)
            if len(half) == len(windows) or (answer := self._try(half, options)) is None:
                self._shortages.note()
                raise OutOfMemory("the device has no memory for this batch")
            answers.append(answer)
        return replace(Prediction.join(answers), model_time_ms=sum(answer.model_time_ms for answer in answers))

    def _try(self, windows: FloatArray, options: Options) -> Prediction | None:
        """None for want of memory: the error itself holds what fills it, and must be gone before the next try."""
        try:
            return self._engine.predict(windows, options)
        except OUT_OF_MEMORY:
            return None
