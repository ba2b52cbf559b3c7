"""The model's tensors as the protocol names them, and the ways in which their values are written down."""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import Any

import numpy as np

from app.api.numbers import as_float32
from app.errors import InvalidInput
from serve_app.contract import CLASSES, MEMBERS, N_FEATURES, N_STEPS, WINDOW_BYTES, FloatArray

DATATYPE = "FP32"
INPUT = "windows"
INPUT_SHAPE = (-1, N_FEATURES, N_STEPS)

# Every output is a field of `Prediction`; -1 is an axis whose length the request or the model decides.
OUTPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "classification_probs": (-1, len(CLASSES)),
    "regression_pred": (-1,),
    "regression_uncertainty": (-1,),
    "aleatoric": (-1,),
    "epistemic": (-1,),
    "ensemble_weights": (-1, len(MEMBERS)),
    "features": (-1, -1),
}
UNCERTAINTY = frozenset({"regression_uncertainty", "aleatoric", "epistemic"})
ON_REQUEST = frozenset({"epistemic", "ensemble_weights", "features"})
DEFAULT_OUTPUTS = tuple(name for name in OUTPUT_SHAPES if name not in ON_REQUEST)


def batch_size(shape: Any) -> int:
    """B of a shape [B, 50, 60] as the request states it. Raises `InvalidInput` for any other."""
    if (
        type(shape) is list
        and len(shape) == len(INPUT_SHAPE)
        and all(type(length) is int for length in shape)
        and shape[0] >= 1
        and shape[1:] == [N_FEATURES, N_STEPS]
    ):
        return int(shape[0])
    raise InvalidInput(f"the shape of {INPUT} must be [B, {N_FEATURES}, {N_STEPS}] with B of at least 1")


def from_bytes(body: bytes, offset: int, n_windows: int) -> FloatArray:
    """Windows from little-endian float32 values at `offset` of the body, as a view wherever the processor allows it.

    Args:
        body: The whole body of the request.
        offset: Where the values begin; after a header of JSON, that may be anywhere.
        n_windows: B; the body must reach that far.

    Returns:
        float32[B, F, T], not yet checked for being finite.
    """
    array = np.frombuffer(body, "<f4", n_windows * N_FEATURES * N_STEPS, offset)
    if not array.flags.aligned:  # a copy of 12 kB costs less than one pass over values that straddle words
        array = array.copy()
    return array.reshape(n_windows, N_FEATURES, N_STEPS)


def whole_windows(size_bytes: int) -> int:
    """How many windows so many bytes are. Raises `InvalidInput` where they are none, or not a whole number."""
    n_windows, rest = divmod(size_bytes, WINDOW_BYTES)
    if rest or not n_windows:
        raise InvalidInput(f"the data of {INPUT} must be {WINDOW_BYTES} bytes per window")
    return n_windows


def from_json(data: Any, n_windows: int) -> FloatArray:
    """Windows from a list of numbers, flat in row-major order or nested as the shape is.

    Args:
        data: What the JSON parser made of the tensor's data.
        n_windows: B.

    Returns:
        float32[B, F, T], not yet checked for being finite.

    Raises:
        InvalidInput: Something else than a number, or not as many as the shape has.
    """
    shape = (n_windows, N_FEATURES, N_STEPS)
    if type(data) is not list:
        raise InvalidInput(f"the data of {INPUT} must be a list")
    values = _flatten(data, shape) if data and type(data[0]) is list else data
    if len(values) != prod(shape):
        raise InvalidInput(f"the data of {INPUT} must be as many numbers as its shape says")
    try:
        return as_float32(values).reshape(shape)
    except TypeError:
        raise InvalidInput(f"the data of {INPUT} must be numbers") from None


def _flatten(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    level: list[Any] = [data]
    for length in shape:
        if any(type(row) is not list or len(row) != length for row in level):
            raise InvalidInput(f"the data of {INPUT} must be nested as its shape says, or flat")
        level = list(chain.from_iterable(level))
    return level
