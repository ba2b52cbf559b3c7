"""JSON documents of strangers: strict, shallow, and no name given twice.

The parser refuses what RFC 8259 refuses: NaN, numbers beyond a double, lone surrogates, a byte order mark, what is no
UTF-8. It nests as deep as memory allows and keeps the last of two equal names, where another reader may keep the
first and see another request; both are held here.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import orjson

from app.errors import BadRequest, InvalidInput

MAX_DEPTH = 8
# What may stand in a document beside the numbers of a tensor; an honest one has a few dozen.
_MAX_VALUES = 10_000

# Sixty numbers take 120 bytes at least; a long text with more lists than that would make twenty times its size of them.
_LONG_BYTES = 64 * 1024
_MIN_BYTES_PER_CONTAINER = 64

_CONTAINERS = frozenset({dict, list})


def parse_object(text: bytes | memoryview) -> dict[str, Any]:
    """Parse an object; its depth and the names in it are still to be checked.

    Raises:
        BadRequest: Not JSON, or a long text of little but lists and objects.
        InvalidInput: JSON, but no object.
    """
    if len(text) > _LONG_BYTES and _count_containers(text) * _MIN_BYTES_PER_CONTAINER > len(text):
        raise BadRequest("the JSON holds more lists and objects than any windows would")
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise BadRequest("the body is not JSON") from None
    if type(document) is not dict:
        raise InvalidInput("the body must be a JSON object")
    return document


def read_object(text: bytes) -> dict[str, Any]:
    """Parse an object and check it whole.

    Raises:
        BadRequest: Not JSON, nested too deeply, too long, or a name is given twice.
        InvalidInput: JSON, but no object.
    """
    document = parse_object(text)
    refuse_repeated_names(text, count_strings(document))
    return document


def count_strings(document: Any) -> int:
    """How many names and text values a parsed document holds. Raises `BadRequest` for one too deep or too long."""
    n_strings = n_values = 0
    level = [document]
    for _ in range(MAX_DEPTH):
        objects = [node for node in level if type(node) is dict]
        lists = [node for node in level if type(node) is list]
        n_values += sum(map(len, objects)) + sum(map(len, lists))
        if n_values > _MAX_VALUES:
            raise BadRequest(f"the JSON may hold at most {_MAX_VALUES} values beside the data")
        below = list(chain(chain.from_iterable(lists), *(node.values() for node in objects)))
        n_strings += sum(map(len, objects)) + sum(type(node) is str for node in below)
        level = [node for node in below if type(node) in _CONTAINERS]
        if not level:
            return n_strings
    raise BadRequest(f"the JSON may be nested {MAX_DEPTH} deep at most")


def refuse_repeated_names(text: bytes | memoryview, n_strings: int) -> None:
    """Raise `BadRequest` where the text holds more strings than came of it: the parser dropped a name given twice.

    Args:
        text: What was parsed.
        n_strings: Names and text values of the document, as `count_strings` counts them.
    """
    if _count_written_strings(text) != n_strings:
        raise BadRequest("a name is given twice")


def _count_containers(text: bytes | memoryview) -> int:
    array = np.frombuffer(text, np.uint8)
    return int(np.count_nonzero(array == ord("[")) + np.count_nonzero(array == ord("{")))


def _count_written_strings(text: bytes | memoryview) -> int:
    """Strings of a valid JSON text: every quote that is not escaped begins or ends one."""
    array = np.frombuffer(text, np.uint8)
    if (array == ord("\\")).any():
        unescaped = bytes(text).replace(b"\\\\", b"").replace(b'\\"', b"")
        return unescaped.count(b'"') // 2
    return int(np.count_nonzero(array == ord('"'))) // 2
