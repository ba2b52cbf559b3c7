"""What the gateway and the model side agree on: windows in, predictions out, and how either can fail.

Everything here is numpy and the standard library, so that the gateway can import it without torch or Ray.

Axes: B batch, F features, T time steps, C classes, M ensemble members, K fused features.

The failures, and the HTTP status that the gateway gives each (`app/errors.py` holds that table):

    ServingError
    ├── InvalidWindows        the caller's windows are not what the model takes          422
    ├── ModelNotFound         no such model or version                                   404
    ├── ModelOutputInvalid    the model answered NaN, infinity or no distribution        502
    ├── ModelFailed           the forward pass raised                                    502
    ├── DeadlineExceeded      the caller's deadline passed before there was an answer    504
    └── Unavailable           this arm cannot answer now                                 503
        ├── NotReady          no cluster, no replica, or still loading
        ├── Overloaded        its bounded queue is full: shed, never retried elsewhere
        ├── ReplicaLost       the process that held the call died
        └── OutOfMemory       the model's device has no memory for the batch
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

MODEL_NAME = "cnn_lstm"
APP_NAME = "cnn_lstm_predictor"
N_FEATURES = 50
N_STEPS = 60
CLASSES = ("down", "flat", "up")
MEMBERS = ("cnn", "lstm", "fusion")
WINDOW_BYTES = N_FEATURES * N_STEPS * 4

# Features are z-scores clipped to ±5 inside the model; anything near this is a unit error upstream.
MAX_ABS_VALUE = 1e6


class ServingError(Exception):
    """Base of every failure that may cross from the model side to the gateway.

    Args:
        detail: One sentence that is safe to show to the caller: no input values, paths or traces.
    """

    code = "serving-error"

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail)
        self.detail = detail


class InvalidWindows(ServingError):
    code = "invalid-windows"


class ModelNotFound(ServingError):
    code = "model-not-found"


class ModelOutputInvalid(ServingError):
    code = "model-output-invalid"


class ModelFailed(ServingError):
    code = "model-failed"


class DeadlineExceeded(ServingError):
    code = "deadline-exceeded"


class Unavailable(ServingError):
    code = "unavailable"


class NotReady(Unavailable):
    code = "not-ready"


class Overloaded(Unavailable):
    code = "overloaded"


class ReplicaLost(Unavailable):
    code = "replica-lost"


class OutOfMemory(Unavailable):
    code = "out-of-memory"


# Errors cross process borders as (code, detail); this is the way back.
ERRORS_BY_CODE: dict[str, type[ServingError]] = {
    error.code: error
    for error in (
        ServingError,
        InvalidWindows,
        ModelNotFound,
        ModelOutputInvalid,
        ModelFailed,
        DeadlineExceeded,
        Unavailable,
        NotReady,
        Overloaded,
        ReplicaLost,
        OutOfMemory,
    )
}


class Options(NamedTuple):
    """What the caller asked for beside the prediction; hashable, so that groups are formed by it."""

    return_uncertainty: bool = True
    use_ensemble: bool = True
    return_features: bool = False


def as_windows(array: npt.NDArray[Any]) -> FloatArray:
    """Check a caller's array and return it as one contiguous batch of windows.

    Args:
        array: Numbers of shape (F, T) or (B, F, T) with F=50, T=60 and B >= 1.

    Returns:
        C-contiguous float32[B, F, T]; no copy is made when the input already is that.

    Raises:
        InvalidWindows: No numbers, wrong rank or shape, an empty batch, a value that is not finite as float32,
            or one beyond ±1e6.
    """
    if array.dtype.kind not in "fiu":  # numpy would read text and dates as numbers, or fail in words of its own
        raise InvalidWindows("data must hold real numbers")
    if array.ndim == 2:
        array = array[np.newaxis]
    if array.ndim != 3 or array.shape[1:] != (N_FEATURES, N_STEPS):
        raise InvalidWindows(
            f"data must have shape ({N_FEATURES}, {N_STEPS}) or (B, {N_FEATURES}, {N_STEPS}): features by time steps"
        )
    if array.shape[0] == 0:
        raise InvalidWindows("data must hold at least one window")
    if array.dtype == np.float32:
        windows: FloatArray = np.ascontiguousarray(array)
    else:
        with np.errstate(over="ignore"):  # 1e300 is finite in float64 and infinite in float32: caught just below
            windows = np.ascontiguousarray(array, dtype=np.float32)
    # One reduction tells NaN, infinity and range apart from good data: every comparison with NaN is false.
    if not np.abs(windows).max() <= MAX_ABS_VALUE:
        raise InvalidWindows(f"data must hold finite numbers of at most {MAX_ABS_VALUE:g} in size")
    return windows


_META_LENGTH = struct.Struct("<I")
_ARRAYS = (
    "classification_probs",
    "regression_pred",
    "regression_uncertainty",
    "aleatoric",
    "epistemic",
    "predictive_entropy",
    "ensemble_weights",
    "features",
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer for a batch of B windows; every array is C-contiguous, as the JSON encoder needs it.

    Attributes:
        classification_probs: float32[B, C], rows sum to one, classes in the order of `CLASSES`.
        regression_pred: float32[B], expected return over the horizon in units of its volatility (sd about 1).
        regression_uncertainty: float32[B], standard deviation; its square is aleatoric² + epistemic².
        aleatoric: float32[B], standard deviation of the noise the model expects.
        epistemic: float32[B], standard deviation over weight samples of the heads.
        predictive_entropy: float32[B], nats, of the mean class distribution.
        ensemble_weights: float32[B, M], weights of `MEMBERS`; None when the fusion head answered alone.
        features: float32[B, K], the fused features; None unless asked for.
        model_name: Name in the registry; None from a remote service, which does not tell it.
        model_version: Version in the registry, never an alias; None likewise.
        model_time_ms: Milliseconds of the forward pass of the whole group this row was in.
        batch_wait_ms: Milliseconds the group waited at the model for its turn.

    The four uncertainty arrays are None together when `Options.return_uncertainty` is false. Our own engines give all
    of them otherwise; a remote service may tell the first alone, or none, and no fused features.
    """

    classification_probs: FloatArray
    regression_pred: FloatArray
    regression_uncertainty: FloatArray | None
    aleatoric: FloatArray | None
    epistemic: FloatArray | None
    predictive_entropy: FloatArray | None
    ensemble_weights: FloatArray | None
    features: FloatArray | None
    model_name: str | None
    model_version: str | None
    model_time_ms: float
    batch_wait_ms: float = 0.0

    def __len__(self) -> int:
        return len(self.classification_probs)

    def rows(self, start: int, stop: int) -> Prediction:
        """The answer for windows start..stop of the batch, as views."""
        values: Any = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, array in self._arrays():
            values[name] = array[start:stop]
        return Prediction(**values)  # quicker than `replace`

    def check(self) -> None:
        """Refuse an answer that no caller may act on.

        Raises:
            ModelOutputInvalid: A value is not finite, a class row is no distribution, or a deviation is negative.
        """
        for _, array in self._arrays():
            if not np.isfinite(array).all():
                raise ModelOutputInvalid("the model's answer is not finite")
        probs = self.classification_probs
        if (probs < 0).any() or (np.abs(probs.sum(axis=1) - 1.0) > 1e-3).any():
            raise ModelOutputInvalid("the model's class probabilities are no distribution")
        if self.regression_uncertainty is not None and (self.regression_uncertainty < 0).any():
            raise ModelOutputInvalid("the model's uncertainty is negative")

    def pack(self) -> bytes:
        """Encode for another process: u32 length of the JSON head, the head, then the arrays' float32 bytes."""
        arrays = self._arrays()
        head = json.dumps(
            {
                "model": [self.model_name, self.model_version],
                "ms": [self.model_time_ms, self.batch_wait_ms],
                "arrays": [[name, *array.shape] for name, array in arrays],
            }
        ).encode()
        head += b" " * (-len(head) % 4)  # keeps the float32 data aligned
        return b"".join([_META_LENGTH.pack(len(head)), head, *(array.tobytes() for _, array in arrays)])

    @classmethod
    def unpack(cls, buffer: bytes | memoryview) -> Prediction:
        """Decode what `pack` made; the arrays are read-only views of `buffer`."""
        (head_bytes,) = _META_LENGTH.unpack_from(buffer)
        offset = _META_LENGTH.size + head_bytes
        head = json.loads(bytes(buffer[_META_LENGTH.size : offset]))
        arrays: dict[str, Any] = dict.fromkeys(_ARRAYS)
        for name, *shape in head["arrays"]:
            count = math.prod(shape)
            arrays[name] = np.frombuffer(buffer, np.float32, count, offset).reshape(shape)
            offset += 4 * count
        name, version = head["model"]
        model_ms, wait_ms = head["ms"]
        return cls(**arrays, model_name=name, model_version=version, model_time_ms=model_ms, batch_wait_ms=wait_ms)

    @staticmethod
    def join(parts: list[Prediction]) -> Prediction:
        """Put the answers for consecutive parts of one batch together again.

        Times are the largest of the parts: they ran side by side or one after another inside one wait.
        All parts must come from one model version and one set of options.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        joined: dict[str, Any] = {name: _concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return replace(
            first,
            **joined,
            model_time_ms=max(part.model_time_ms for part in parts),
            batch_wait_ms=max(part.batch_wait_ms for part in parts),
        )

    def _arrays(self) -> list[tuple[str, FloatArray]]:
        return [(name, array) for name in _ARRAYS if (array := getattr(self, name)) is not None]


def _concatenate(arrays: list[FloatArray | None]) -> FloatArray | None:
    """None unless every part has it: half of a batch's answer is none."""
    told = [array for array in arrays if array is not None]
    return np.concatenate(told) if len(told) == len(arrays) else None
