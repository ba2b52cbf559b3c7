"""What lanes send holds the windows, and what they read of an answer is its class probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.peers import lanes
from benchmarks.peers.answer import ANSWERED, answer_columns
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.lanes import Lane
from serve_app.contract import CLASSES, MEMBERS, FloatArray, Prediction

ALL_LANES = {f"{peer.name} {name}": lane for peer in PEERS.values() for name, lane in peer.lanes.items()}


def windows(count: int) -> FloatArray:
    return np.random.default_rng(count).standard_normal((count, 50, 60), dtype=np.float32)


def prediction(count: int) -> Prediction:
    random = np.random.default_rng(count)
    return Prediction(
        classification_probs=random.random((count, len(CLASSES)), dtype=np.float32),
        regression_pred=random.random(count, dtype=np.float32),
        regression_uncertainty=random.random(count, dtype=np.float32),
        aleatoric=None,
        epistemic=None,
        predictive_entropy=None,
        ensemble_weights=random.random((count, len(MEMBERS)), dtype=np.float32),
        features=None,
        model_name="cnn_lstm",
        model_version="1",
        model_time_ms=1.0,
    )


def read_windows(body: bytes, lane: Lane) -> FloatArray:
    """What a server of this lane reads, by the way its headers and path name."""
    if head_bytes := lane.headers.get("Inference-Header-Content-Length"):
        tensor = json.loads(body[: int(head_bytes)])["inputs"][0]
        assert tensor["parameters"]["binary_data_size"] == len(body) - int(head_bytes)
        return np.frombuffer(body, "<f4", offset=int(head_bytes)).reshape(tensor["shape"])
    if lane.headers["Content-Type"] == "application/octet-stream":
        return np.frombuffer(body, "<f4").reshape(-1, 50, 60)
    document = json.loads(body)
    if "inputs" in document:
        tensor = document["inputs"][0]
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    return np.array(document["data"], np.float32)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("lane", ALL_LANES.values(), ids=ALL_LANES.keys())
def test_every_body_holds_exactly_its_windows(lane: Lane, count: int) -> None:
    np.testing.assert_array_equal(read_windows(lane.body(windows(count)), lane), windows(count))


def test_a_json_window_is_as_long_as_clients_write_it() -> None:
    window = windows(1)
    by_the_standard_library = json.dumps({"data": window.tolist()}, separators=(",", ":")).encode()
    assert lanes.json_body("data")(window) == by_the_standard_library
    assert len(by_the_standard_library) == pytest.approx(59_000, rel=0.05)


def test_columns_are_read_back() -> None:
    answer = prediction(8)
    body = json.dumps({name: column.tolist() for name, column in answer_columns(answer).items()}).encode()
    np.testing.assert_array_equal(lanes.from_columns(body), answer.classification_probs)


def test_the_documents_answer_is_read_back() -> None:
    answer = prediction(8)
    body = json.dumps({"predictions": {"classification_probs": answer.classification_probs.tolist()}}).encode()
    np.testing.assert_array_equal(lanes.from_document(body), answer.classification_probs)


def test_rows_are_read_back() -> None:
    answer = prediction(8)
    rows = [{"classification_probs": row} for row in answer.classification_probs.tolist()]
    np.testing.assert_array_equal(lanes.from_rows(json.dumps(rows).encode()), answer.classification_probs)


def oip_outputs(answer: Prediction) -> list[tuple[str, FloatArray]]:
    """In an order in which the probabilities are not the first."""
    return sorted(answer_columns(answer).items(), key=lambda column: column[0], reverse=True)


def test_outputs_of_the_protocol_are_read_back_from_lists() -> None:
    answer = prediction(8)
    outputs = [
        {"name": name, "shape": list(column.shape), "data": column.ravel().tolist()}
        for name, column in oip_outputs(answer)
    ]
    read = lanes.from_oip_json(json.dumps({"outputs": outputs}).encode())
    np.testing.assert_array_equal(read, answer.classification_probs)


def test_outputs_of_the_protocol_are_read_back_from_behind_the_head() -> None:
    answer = prediction(8)
    outputs = [
        {"name": name, "shape": list(column.shape), "parameters": {"binary_data_size": column.nbytes}}
        for name, column in oip_outputs(answer)
    ]
    body = json.dumps({"outputs": outputs}).encode() + b"".join(column.tobytes() for _, column in oip_outputs(answer))
    np.testing.assert_array_equal(lanes.from_oip_binary(body), answer.classification_probs)


def test_an_answer_of_the_protocol_without_probabilities_is_no_answer() -> None:
    with pytest.raises(ValueError, match="classification_probs"):
        lanes.from_oip_binary(b'{"outputs":[]}')


def test_a_protocol_request_asks_for_what_every_peer_answers() -> None:
    document = json.loads(lanes.oip_json_body(windows(1)))
    assert [output["name"] for output in document["outputs"]] == list(ANSWERED)
