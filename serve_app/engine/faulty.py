"""An engine that fails on purpose: the model side of fault tests. Its name is refused where PROD=1 is set.

    GATEWAY_FAULT_FILE=/tmp/fault.json sluice deploy --engine faulty      # on the replicas
    GATEWAY_FAULT_FILE=/tmp/fault.json GATEWAY_ENGINE=faulty sluice serve  # as legacy, in the gateway itself

The file is read before every forward pass, so that a test can change what the model does while it runs. Replace it by
a rename, so that nobody reads a half of it:

    {"behaviour": "ok"}                          a constant, at once
    {"behaviour": "ok", "ms": 20}                … after 20 ms, whatever the size of the batch; any behaviour takes it
    {"behaviour": "hang"}                        no answer until the file names another behaviour
    {"behaviour": "raise"}                       the forward pass raises
    {"behaviour": "nan"}                         every value of the answer is NaN
    {"behaviour": "oom"}                         the device is out of memory: torch.OutOfMemoryError
    {"behaviour": "oom", "above_windows": 8}     … for batches of more than 8 windows
    {"behaviour": "exit"}                        the process ends at once, as if it were killed
    {"behaviour": "nan", "every": 100}           at every 100th pass, else ok
    {"behaviour": "raise", "mark": 13.0}         if a window of the batch begins with 13.0, else ok; with `nan`, in
                                                 that window's row alone
    {"behaviour": "ok", "version": "7"}          the version that the model says it is, as the file was at its loading
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.contract import FloatArray, Options, Prediction
from serve_app.engine.base import Setup
from serve_app.engine.stubs import NoopEngine
from serve_app.registry import Artefact

LOOK_PERIOD_S = 0.01  # while it hangs
EXIT_CODE = 1


class Fault(BaseModel):
    """What the engine shall do, as the file has it.

    Attributes:
        behaviour: See the module's text.
        ms: Milliseconds that each pass takes.
        above_windows: Batches of up to so many windows are answered all the same.
        every: Only each so-manieth pass of this process misbehaves.
        mark: Only batches misbehave in which a window's first value is this.
        version: What the model says it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    behaviour: Literal["ok", "hang", "raise", "nan", "oom", "exit"] = "ok"
    ms: Annotated[float, Field(ge=0, le=60_000)] = 0.0
    above_windows: Annotated[int, Field(ge=0)] = 0
    every: Annotated[int, Field(ge=1)] = 1
    mark: float | None = None
    version: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")] = "0"

    @classmethod
    def read(cls, path: Path) -> Fault:
        """Raises: ValueError: The file cannot be read, or says something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ValueError(f"the fault file {path} cannot be read: {error}") from error


class FaultyEngine(NoopEngine):
    """Answers a constant, or misbehaves as its file says.

    Raises:
        ValueError: No file is named, or it is none, or this process runs with PROD=1.
    """

    name = "faulty"
    model_name = "faulty"

    def __init__(self, artefact: Artefact | None, setup: Setup) -> None:
        super().__init__(artefact, setup)
        # Whoever deploys is refused before; a replica is started by Ray, and has no settings but its environment.
        if os.environ.get("PROD", "").lower() not in {"", "0", "false"}:
            raise ValueError("the faulty engine fails on purpose: not with PROD=1")
        if setup.fault_file is None:
            raise ValueError("the faulty engine needs a fault file")
        self._file = setup.fault_file
        self._fault = Fault.read(self._file)
        self._passes = 0
        self.model_version = self._fault.version

    def predict(self, windows: FloatArray, options: Options) -> Prediction:
        started = time.perf_counter()
        fault = self._look()
        self._passes += 1
        time.sleep(fault.ms / 1e3)
        is_hit = self._passes % fault.every == 0 and len(windows) > fault.above_windows
        rows = _rows(windows, fault.mark)
        answer = self._constant(len(windows), options)
        if is_hit and rows.any():
            answer = self._misbehave(fault.behaviour, answer, rows)
        return replace(answer, model_time_ms=1e3 * (time.perf_counter() - started))

    def _misbehave(self, behaviour: str, answer: Prediction, rows: npt.NDArray[np.bool_]) -> Prediction:
        match behaviour:
            case "exit":
                os._exit(EXIT_CODE)
            case "raise":
                raise RuntimeError("told to fail")
            case "oom":
                raise torch.OutOfMemoryError("told to be out of memory")
            case "nan":
                _spoil(answer, rows)
            case "hang":
                while self._look().behaviour == "hang":
                    time.sleep(LOOK_PERIOD_S)
        return answer

    def _look(self) -> Fault:
        """What the file says now; what it said before where it cannot be read, as while it is being written."""
        with contextlib.suppress(ValueError):
            self._fault = Fault.read(self._file)
        return self._fault


def _rows(windows: FloatArray, mark: float | None) -> npt.NDArray[np.bool_]:
    """bool[B], the windows that are meant."""
    return np.full(len(windows), True) if mark is None else windows[:, 0, 0] == np.float32(mark)


def _spoil(answer: Prediction, rows: npt.NDArray[np.bool_]) -> None:
    for name in ("classification_probs", "regression_pred"):
        getattr(answer, name)[rows] = np.nan
