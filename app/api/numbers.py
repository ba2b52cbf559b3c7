"""Numbers out of JSON, quickly and strictly."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from serve_app.contract import FloatArray

_FEW = 1000
_OF_NUMBERS = b"0123456789.eE+-"  # all that orjson writes them with


def as_float32(values: list[Any]) -> FloatArray:
    """What a JSON parser made of a list of numbers, as one array.

    Args:
        values: Anything that JSON has; no list is looked into.

    Returns:
        float32[len(values)]; infinite where a number is beyond float32.

    Raises:
        TypeError: A value is no number.
    """
    array: FloatArray = rows_as_float32([values])[0]
    return array


def rows_as_float32(rows: list[list[Any]]) -> FloatArray:
    """What a JSON parser made of lists of numbers, as one array.

    `struct` takes nothing but numbers, in less than half of numpy's time. True and false are numbers to it, so wherever
    one of those may have stood is looked at once more.

    Args:
        rows: At least one list of anything that JSON has.

    Returns:
        float32[len(rows), len(rows[0])]; infinite where a number is beyond float32.

    Raises:
        TypeError: A value is no number, or a row is longer than another.
    """
    length = len(rows[0])
    pack = struct.Struct(f"{length}f").pack
    try:
        packed = b"".join([pack(*row) for row in rows])
    except struct.error:
        raise TypeError("a value is no number, or a row is longer than another") from None
    array = np.frombuffer(packed, np.float32).reshape(len(rows), length)
    if _holds_truth(rows, (array == 0) | (array == 1)):
        raise TypeError("a value is no number")
    return array


def find_no_number(values: list[Any]) -> int | None:
    """The place of the first value that is no number; None where all are."""
    text = outline(values)
    if text is None:
        return _find_in_halves(values)
    rest = text[1:].lstrip(b",")  # the first other thing stands behind as many commas as there are values before it
    return None if rest == b"]" else len(text) - 1 - len(rest)


def _find_in_halves(values: list[Any]) -> int | None:
    """As above, where a value is nested too deeply: until that one stands alone, or another before it is found."""
    middle = len(values) // 2
    if not middle:
        return 0
    place = find_no_number(values[:middle])
    if place is None and (beyond := find_no_number(values[middle:])) is not None:
        place = middle + beyond
    return place


def outline(value: Any) -> bytes | None:
    """What is left of a value's JSON without its numbers, `[,,[]]` of `[1,2,[3]]`; None where it is nested too deeply.

    Numbers leave nothing and all else does. Python takes ten times as long to look at a type as orjson to write a
    number, and of those there may be half a million.
    """
    try:
        return orjson.dumps(value).translate(None, _OF_NUMBERS)
    except orjson.JSONEncodeError:  # it writes less deep lists than it reads
        return None


def _holds_truth(rows: list[list[Any]], is_suspect: npt.NDArray[np.bool_]) -> bool:
    """Whether true or false stands at one of the places; where those are many, their rows are written out instead."""
    suspects = np.flatnonzero(is_suspect)
    if len(suspects) > _FEW:
        text = orjson.dumps([rows[index] for index in np.flatnonzero(is_suspect.any(axis=1)).tolist()])
        return b"t" in text or b"f" in text
    length = is_suspect.shape[1]
    return any(type(rows[place // length][place % length]) is bool for place in suspects.tolist())
