"""Inference requests and responses: an object in JSON and, behind it, the tensors that travel as bytes.

    request   {"id", "parameters", "inputs": [windows], "outputs": […]} [float32 …]
    response  {"model_name", "model_version", "id", "outputs": […]} [float32 …][float32 …]

Fields and parameters that nobody here knows are ignored, as the protocol's extensions want it; known ones are checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import orjson

from app.api.documents import count_strings, parse_object, refuse_repeated_names
from app.api.oip.tensors import (
    DATATYPE,
    DEFAULT_OUTPUTS,
    INPUT,
    OUTPUT_SHAPES,
    UNCERTAINTY,
    batch_size,
    from_bytes,
    from_json,
    whole_windows,
)
from app.errors import BadRequest, InvalidInput
from serve_app.contract import WINDOW_BYTES, FloatArray, Options, Prediction, as_windows

MAX_ID_CHARS = 256

# A client's requests mostly differ in their bytes alone, so small headers are remembered: 256 KiB of them, and at most
# a few MiB of what their JSON became.
_MAX_REMEMBERED_BYTES = 1024
_MAX_REMEMBERED = 256

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
_SCALARS = frozenset({str, int, float, bool})
_NOTHING: dict[str, Any] = {}

_T = TypeVar("_T", dict[str, Any], list[Any], str, bool, int)


class Wanted(NamedTuple):
    """How a response is to be written.

    Attributes:
        outputs: Names in their order, each with whether it travels as bytes.
        request_id: The caller's `id`, to be repeated.
    """

    outputs: tuple[tuple[str, bool], ...]
    request_id: str | None = None


class InferRequest(NamedTuple):
    """An inference request, checked.

    Attributes:
        windows: float32[B, F, T].
        options: What the model has to answer for `wanted`.
        wanted: How the answer is to be written.
        timeout_ms: The caller's deadline, None where it set none.
    """

    windows: FloatArray
    options: Options
    wanted: Wanted
    timeout_ms: int | None = None


class _Header(NamedTuple):
    """What the JSON of a request says.

    Attributes:
        n_windows: B.
        data: The input's values, None where they are the bytes behind the JSON.
        n_strings: Names and text values of the JSON beside the data.
        options, wanted, timeout_ms: As in `InferRequest`.
    """

    n_windows: int
    data: Any
    n_strings: int
    options: Options
    wanted: Wanted
    timeout_ms: int | None


_RAW = Wanted(tuple((name, True) for name in DEFAULT_OUTPUTS))


def decode_request(body: bytes, header_bytes: int | None) -> InferRequest:
    """Read the body of an inference request.

    Args:
        body: As sent, any compression undone.
        header_bytes: Length of the JSON at the body's beginning. None where the whole body is JSON; zero where it is
            nothing but the input's values, and the answer comes as bytes too.

    Raises:
        BadRequest: Not JSON, or the body is shorter than its header.
        InvalidInput: Not what the protocol or the model asks for.
        InvalidWindows: The numbers are not windows.
    """
    if header_bytes == 0:
        return InferRequest(as_windows(from_bytes(body, 0, whole_windows(len(body)))), Options(), _RAW)
    if header_bytes is not None and header_bytes > len(body):
        raise BadRequest("Inference-Header-Content-Length is more than the body's length")
    end = len(body) if header_bytes is None else header_bytes
    header = _remembered_header(body[:end]) if end <= _MAX_REMEMBERED_BYTES else _read_header(memoryview(body)[:end])
    windows = as_windows(_read_windows(header, body, end))
    if header.data is not None:
        refuse_repeated_names(memoryview(body)[:end], header.n_strings)  # the data, as is now known, hold no text
    return InferRequest(windows, header.options, header.wanted, header.timeout_ms)


def encode_response(prediction: Prediction, wanted: Wanted, model_name: str) -> tuple[bytes, int | None]:
    """Write an inference response; outputs that a remote legacy does not tell are left out.

    Returns:
        The body, and the length of the JSON at its beginning where bytes follow it.
    """
    outputs: list[dict[str, Any]] = []
    document: dict[str, Any] = {"model_name": model_name, "outputs": outputs}
    if prediction.model_version is not None:
        document["model_version"] = prediction.model_version
    if wanted.request_id is not None:
        document["id"] = wanted.request_id
    values: list[FloatArray] = []
    for name, is_binary in wanted.outputs:
        array: FloatArray | None = getattr(prediction, name)
        if array is None:
            continue
        output: dict[str, Any] = {"name": name, "datatype": DATATYPE, "shape": array.shape}
        if is_binary:
            output["parameters"] = {"binary_data_size": array.nbytes}
            values.append(array)
        else:
            output["data"] = array.reshape(-1)
        outputs.append(output)
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not values:
        return header, None
    return b"".join((header, *(array.data for array in values))), len(header)


def _read_header(text: bytes | memoryview) -> _Header:
    document = parse_object(text)
    parameters = _parameters(document)
    wanted = Wanted(_outputs(document, parameters), _request_id(document))
    n_windows, data = _input(document)
    n_strings = count_strings(document)
    if data is None:
        refuse_repeated_names(text, n_strings)
    return _Header(n_windows, data, n_strings, _options(wanted, parameters), wanted, _timeout_ms(parameters))


_remembered_header = lru_cache(_MAX_REMEMBERED)(_read_header)


def _read_windows(header: _Header, body: bytes, end: int) -> FloatArray:
    """The input's values, from the JSON or from the bytes behind it, which must be used up."""
    is_binary = header.data is None
    if len(body) - end != (header.n_windows * WINDOW_BYTES if is_binary else 0):
        raise InvalidInput("the bytes behind the JSON must be those that its inputs announce")
    return from_bytes(body, end, header.n_windows) if is_binary else from_json(header.data, header.n_windows)


def _input(document: dict[str, Any]) -> tuple[int, Any]:
    """The one input's B, and its data where they are not bytes; the data are taken out of the document."""
    inputs = _member(document, "inputs", list)
    if inputs is None or len(inputs) != 1 or type(inputs[0]) is not dict or inputs[0].get("name") != INPUT:
        raise InvalidInput(f"inputs must hold one input, {INPUT}")
    (tensor,) = inputs
    if tensor.get("datatype") != DATATYPE:
        raise InvalidInput(f"the datatype of {INPUT} must be {DATATYPE}")
    n_windows = batch_size(tensor.get("shape"))
    parameters = _parameters(tensor)
    _refuse_shared_memory(parameters)
    size_bytes = _member(parameters, "binary_data_size", int)
    data = tensor.get("data")
    if data is not None:
        tensor["data"] = None
    if (size_bytes is None) == (data is None):
        raise InvalidInput(f"{INPUT} must have either data or the parameter binary_data_size")
    if size_bytes not in (None, n_windows * WINDOW_BYTES):
        raise InvalidInput(f"binary_data_size must be {WINDOW_BYTES} for each window that the shape says")
    return n_windows, data


def _outputs(document: dict[str, Any], parameters: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    default = _member(parameters, "binary_data_output", bool) or False
    requested = _member(document, "outputs", list)
    if requested:
        outputs = tuple(_output(output, default) for output in requested[: len(OUTPUT_SHAPES) + 1])
        if len({name for name, _ in outputs}) < len(requested):
            raise InvalidInput("an output is requested twice")
        return outputs
    return tuple((name, default) for name in _default_outputs(parameters))


def _default_outputs(parameters: dict[str, Any]) -> Iterable[str]:
    if _member(parameters, "return_uncertainty", bool) is False:
        return (name for name in DEFAULT_OUTPUTS if name not in UNCERTAINTY)
    return DEFAULT_OUTPUTS


def _output(output: Any, default: bool) -> tuple[str, bool]:
    name = output.get("name") if type(output) is dict else None
    if type(name) is not str or name not in OUTPUT_SHAPES:
        raise InvalidInput("outputs may hold " + ", ".join(OUTPUT_SHAPES))
    parameters = _parameters(output)
    _refuse_shared_memory(parameters)
    if parameters.get("classification"):
        raise InvalidInput("the classification extension is not supported")
    is_binary = _member(parameters, "binary_data", bool)
    return name, default if is_binary is None else is_binary


def _options(wanted: Wanted, parameters: dict[str, Any]) -> Options:
    names = {name for name, _ in wanted.outputs}
    use_ensemble = _member(parameters, "use_ensemble", bool) is not False
    if "ensemble_weights" in names and not use_ensemble:
        raise InvalidInput("there are no ensemble_weights where use_ensemble is false")
    return Options(not UNCERTAINTY.isdisjoint(names), use_ensemble, "features" in names)


def _timeout_ms(parameters: dict[str, Any]) -> int | None:
    """Triton's `timeout` is in microseconds; zero is none."""
    timeout_us = _member(parameters, "timeout", int)
    if timeout_us is not None and timeout_us < 0:
        raise InvalidInput("the parameter timeout must be microseconds")
    return max(1, timeout_us // 1000) if timeout_us else None


def _request_id(document: dict[str, Any]) -> str | None:
    request_id = _member(document, "id", str)
    if request_id is not None and len(request_id) > MAX_ID_CHARS:
        raise InvalidInput(f"id may have at most {MAX_ID_CHARS} characters")
    return request_id or None


def _parameters(owner: dict[str, Any]) -> dict[str, Any]:
    parameters = _member(owner, "parameters", dict)
    if parameters is None:
        return _NOTHING
    if not _SCALARS.issuperset(map(type, parameters.values())):
        raise InvalidInput("a parameter must be a string, a number, true or false")
    return parameters


def _refuse_shared_memory(parameters: dict[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidInput("the shared memory extensions are not supported")


def _member(owner: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    """A member of this very type (a bool is no int), or None where it is absent or null."""
    value = owner.get(name)
    if value is not None and type(value) is not kind:
        raise InvalidInput(f"{name} must be {_KINDS[kind]}")
    return value
