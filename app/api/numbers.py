"""Numbers out of JSON, quickly and strictly."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.contract import FloatArray

_FEW = 1000


def as_float32(values: list[Any]) -> FloatArray:
    """What a JSON parser made of a list of numbers, as one array.

    `struct` takes nothing but numbers, in less than half of numpy's time. True and false are numbers to it, so wherever
    one of those may have stood is looked at once more.

    Args:
        values: Anything that JSON has; no list is looked into.

    Returns:
        float32[len(values)]; infinite where a number is beyond float32.

    Raises:
        TypeError: A value is no number.
    """
    try:
        packed = struct.pack(f"{len(values)}f", *values)
    except struct.error:
        raise TypeError("a value is no number") from None
    array = np.frombuffer(packed, np.float32)
    suspects = np.flatnonzero((array == 0) | (array == 1))
    if _holds_truth(values, suspects):
        raise TypeError("a value is no number")
    return array


def _holds_truth(values: list[Any], suspects: npt.NDArray[np.intp]) -> bool:
    """Whether true or false stands at one of the places; where those are many, one fast look at everything is less."""
    if len(suspects) > _FEW:
        return bool in set(map(type, values))
    return any(type(values[index]) is bool for index in suspects.tolist())
