"""JSON as credentials and key files must be written: UTF-8, one object, no name twice, no NaN."""

from __future__ import annotations

import json
from typing import Any

FOREVER = 1 << 53  # past every time that JSON can say exactly (RFC 7493, section 2.2)

# All that parsing hostile text can throw.
MALFORMED = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError, TypeError, RecursionError: It is none; `MALFORMED` names them all.
    """
    document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("duplicate name")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError("NaN and Infinity are not JSON")


def read_time(value: Any) -> int:
    """Seconds since the epoch. Raises `ValueError` for what is no integer from 0 up to, not with, `FOREVER`."""
    if type(value) is not int or not 0 <= value < FOREVER:  # a bool is an int to isinstance
        raise ValueError("a time must be an integer")
    return value
