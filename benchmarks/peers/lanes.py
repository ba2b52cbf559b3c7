"""How a peer is asked and what it answered: bodies from windows, class probabilities back from responses.

A lane is one way into a server. `check` reads the class probabilities out of a response, so that whoever measures can
first make sure that every server computes the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from benchmarks.peers.answer import ANSWERED
from serve_app.contract import CLASSES, FloatArray

JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}

# The head's length stands in a header of the request. Blanks after it bring every head to one length, so that the
# header is the same for any number of windows.
_OIP_HEAD_BYTES = 512
OIP_BINARY = {**BYTES, "Inference-Header-Content-Length": str(_OIP_HEAD_BYTES)}


@dataclass(frozen=True)
class Lane:
    """One way to ask a server for predictions.

    Attributes:
        path: Of the route.
        headers: Sent with every request.
        body: float32[B,F,T] as the bytes of a request.
        check: Body of a response to its class probabilities float32[B,C].
        method: Of the route.
    """

    path: str
    headers: Mapping[str, str]
    body: Callable[[FloatArray], bytes]
    check: Callable[[bytes], FloatArray]
    method: str = "POST"


def json_body(field: str) -> Callable[[FloatArray], bytes]:
    """Windows as nested lists under one name: 59 kB each, as `tolist` and any JSON library of a client tell them."""

    def body(windows: FloatArray) -> bytes:
        return orjson.dumps({field: windows.tolist()})

    return body


def raw_body(windows: FloatArray) -> bytes:
    """Windows as little-endian float32, nothing else: 12 kB each."""
    return windows.astype("<f4", copy=False).tobytes()


def from_columns(response: bytes) -> FloatArray:
    """Of `{"classification_probs": [[…], …], …}`."""
    return _probs(orjson.loads(response)["classification_probs"])


def from_rows(response: bytes) -> FloatArray:
    """Of `[{"classification_probs": […], …}, …]`, one object per window."""
    return _probs([row["classification_probs"] for row in orjson.loads(response)])


def from_document(response: bytes) -> FloatArray:
    """Of the design document's `{"predictions": {"classification_probs": [[…], …], …}, …}`."""
    return _probs(orjson.loads(response)["predictions"]["classification_probs"])


def oip_json_body(windows: FloatArray) -> bytes:
    """An inference request of the Open Inference Protocol v2 with its data as one flat list."""
    tensor = {**_oip_input(windows), "data": windows.ravel().tolist()}
    return orjson.dumps({"inputs": [tensor], "outputs": _oip_outputs(binary=False)})


def from_oip_json(response: bytes) -> FloatArray:
    """Of a protocol answer whose outputs are lists."""
    output = _oip_output(orjson.loads(response)["outputs"])
    return _probs(output["data"]).reshape(output["shape"])


def oip_binary_body(windows: FloatArray) -> bytes:
    """The same request with the data behind its head, as the protocol's binary tensor extension has it."""
    tensor = {**_oip_input(windows), "parameters": {"binary_data_size": windows.nbytes}}
    head = orjson.dumps({"inputs": [tensor], "outputs": _oip_outputs(binary=True)})
    return head.ljust(_OIP_HEAD_BYTES) + raw_body(windows)


def from_oip_binary(response: bytes) -> FloatArray:
    """Of a protocol answer whose outputs follow its head in order; the head is one JSON object, so it tells its end."""
    document, head_chars = json.JSONDecoder().raw_decode(response.decode("latin-1"))
    offset = head_chars
    for output in document["outputs"]:
        size_bytes = output["parameters"]["binary_data_size"]
        if output["name"] == "classification_probs":
            return np.frombuffer(response, "<f4", size_bytes // 4, offset).reshape(output["shape"])
        offset += size_bytes
    raise ValueError("the answer holds no classification_probs")


def _oip_input(windows: FloatArray) -> dict[str, Any]:
    return {"name": "windows", "datatype": "FP32", "shape": list(windows.shape)}


def _oip_outputs(*, binary: bool) -> list[dict[str, Any]]:
    return [{"name": name, "parameters": {"binary_data": binary}} for name in ANSWERED]


def _oip_output(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return next(output for output in outputs if output["name"] == "classification_probs")


def _probs(values: Any) -> FloatArray:
    return np.asarray(values, np.float32).reshape(-1, len(CLASSES))
