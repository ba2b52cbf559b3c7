"""Bodies of the native prediction route: windows in, as JSON or raw float32; the answer out, as JSON.

Everything runs on the event loop. A thread would not help it: parsing and conversion hold the interpreter's lock
throughout, and the loop's lag beside 1 MiB bodies (the default cap) came out the same with a thread and without.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import orjson

from app.api.documents import parse_object, refuse_repeated_names
from app.api.numbers import find_no_number, outline, rows_as_float32
from app.errors import BadRequest, InvalidInput
from app.observability.ledger import Ledger
from app.rollout.dispatch import Served
from serve_app.contract import N_FEATURES, N_STEPS, WINDOW_BYTES, FloatArray, Options, as_windows

_FLAGS = Options._fields
_FIELDS = frozenset({"data", *_FLAGS})
_TRUTH = {b"true": True, b"false": False}
# What a list of the data must hold, by the number of list levels below it.
_LENGTHS = {1: (N_STEPS, "numbers"), 2: (N_FEATURES, "lists")}
_WINDOW_OUTLINE = outline([[0] * N_STEPS] * N_FEATURES)


class WindowBatch(NamedTuple):
    """What a request asks for: float32[B, F, T] and the options."""

    windows: FloatArray
    options: Options


def decode_json(body: bytes) -> WindowBatch:
    """Read `{"data": …, "return_uncertainty": …, "use_ensemble": …, "return_features": …}`.

    Args:
        body: UTF-8 JSON; data of shape (F, T) or (B, F, T), the flags optional.

    Raises:
        BadRequest: Not JSON (NaN and Infinity are not), or a field given twice.
        InvalidInput: A field is missing, unknown or of the wrong type, or the data hold something else than numbers.
        InvalidWindows: The numbers are not windows.
    """
    document = parse_object(body)
    if not _FIELDS.issuperset(document):
        raise InvalidInput("there is an unknown field; the fields are " + ", ".join(("data", *_FLAGS)))
    if "data" not in document:
        raise InvalidInput("the field is missing", members={"pointer": "/data"})
    options = Options(**{name: _flag(document[name], name) for name in _FLAGS if name in document})
    windows = as_windows(_numbers(document["data"]))
    refuse_repeated_names(body, len(document))  # by now it holds numbers and booleans alone: all strings are names
    return WindowBatch(windows, options)


def decode_float32(body: bytes, query: bytes) -> WindowBatch:
    """Read raw windows.

    Args:
        body: Little-endian float32 of B·50·60 values.
        query: Query string with the flags.

    Raises:
        BadRequest: The query is not understood.
        InvalidInput: The body is no whole number of windows.
        InvalidWindows: A value is not finite or too large.
    """
    options = decode_flags(query)
    if not body or len(body) % WINDOW_BYTES:
        raise InvalidInput(f"the body must hold B x {N_FEATURES} x {N_STEPS} float32: {WINDOW_BYTES} bytes per window")
    return WindowBatch(as_windows(np.frombuffer(body, "<f4").reshape(-1, N_FEATURES, N_STEPS)), options)


def decode_flags(query: bytes) -> Options:
    """Read flags such as `return_features=true&use_ensemble=false`.

    Raises:
        BadRequest: An unknown or repeated parameter, or a value other than true and false.
    """
    flags: dict[str, bool] = {}
    for pair in query.split(b"&") if query else ():
        name, _, value = pair.partition(b"=")
        flag = name.decode("latin-1")
        if flag not in _FLAGS or flag in flags or value not in _TRUTH:
            raise BadRequest("the query may hold each of " + ", ".join(_FLAGS) + " once, as true or false")
        flags[flag] = _TRUTH[value]
    return Options(**flags)


def encode_answer(served: Served, options: Options, ledger: Ledger, client_request_id: str | None) -> bytes:
    """The answer as JSON; what was not asked for or not told is null, fused features not asked for are left out."""
    prediction = served.answer.prediction
    predictions: dict[str, Any] = {
        "classification_probs": prediction.classification_probs,
        "regression_pred": prediction.regression_pred,
        "ensemble_weights": prediction.ensemble_weights,
    }
    if options.return_features:
        predictions["features"] = prediction.features
    uncertainty = None
    if prediction.regression_uncertainty is not None:
        uncertainty = {
            "regression_uncertainty": prediction.regression_uncertainty,
            "aleatoric": prediction.aleatoric,
            "epistemic": prediction.epistemic,
            "predictive_entropy": prediction.predictive_entropy,
        }
    return orjson.dumps(
        {
            "predictions": predictions,
            "uncertainty": uncertainty,
            "processing_time_ms": round(ledger.total_ms(), 3),
            "model_time_ms": round(prediction.model_time_ms, 3),
            "model_name": prediction.model_name,
            "model_version": prediction.model_version,
            "backend": served.arm.backend,
            "request_id": ledger.request_id,
            "client_request_id": client_request_id,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise InvalidInput("must be true or false", members={"pointer": f"/{name}"})
    return value


def _numbers(data: Any) -> FloatArray:
    """Lists of numbers of one length each as float32[B, F, T]."""
    windows = data if _is_nested(data, 3) else [data]
    if not _are_lists(windows) or len({*map(len, windows)}) > 1:
        raise _fault_in(data)
    rows = list(chain.from_iterable(windows))
    if not _are_lists(rows):
        raise _fault_in(data)
    try:
        flat = rows_as_float32(rows or [[]])
    except TypeError:
        raise _fault_in(data) from None
    return flat.reshape(len(windows), len(windows[0]), -1) if flat.size else flat.reshape(0, 0, 0)


def _are_lists(nodes: list[Any]) -> bool:
    """Looked at before anything is flattened: of a text that would make a list of its characters, a million of them."""
    return all(type(node) is list for node in nodes)


def _is_nested(data: Any, levels: int) -> bool:
    return type(data) is list and (levels == 1 or (len(data) > 0 and _is_nested(data[0], levels - 1)))


def _fault_in(data: Any) -> InvalidInput:
    """Where the data stop being lists of lists of numbers."""
    levels = 3 if _is_nested(data, 3) else 2
    pointer, fault = _find_fault(data, levels, "/data") or ("/data", "must hold numbers only")
    return InvalidInput(fault, members={"pointer": pointer})


def _find_fault(node: Any, levels: int, pointer: str) -> tuple[str, str] | None:
    if type(node) is not list:
        return pointer, "must be a list"
    if levels == 2 and outline(node) == _WINDOW_OUTLINE:  # most windows are good, and there may be many
        return None
    if levels == 1 and (place := find_no_number(node)) is not None:
        return f"{pointer}/{place}", "must be a number"
    for index, child in enumerate(node if levels > 1 else ()):
        if fault := _find_fault(child, levels - 1, f"{pointer}/{index}"):
            return fault
    length, kind = _LENGTHS.get(levels, (len(node), ""))
    return None if len(node) == length else (pointer, f"must hold {length} {kind}")
