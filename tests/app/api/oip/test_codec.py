from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.api.oip.codec import MAX_ID_CHARS, InferRequest, Wanted, decode_request, encode_response
from app.api.oip.tensors import DEFAULT_OUTPUTS, OUTPUT_SHAPES
from app.backends.fake import fake_prediction
from app.errors import GatewayError, problem_of
from serve_app.contract import WINDOW_BYTES, InvalidWindows, Options, Prediction, ServingError
from tests.app.under_test import some_windows

ALL = Options(return_features=True)


def tensor(windows: np.ndarray, **changes: Any) -> dict[str, Any]:
    """The input in JSON, without its values; a change to None removes a member."""
    members = {"name": "windows", "datatype": "FP32", "shape": list(windows.shape), **changes}
    return {name: value for name, value in members.items() if value is not None}


def in_json(windows: np.ndarray, data: Any = None, **changes: Any) -> bytes:
    values = windows.astype(float).ravel().tolist() if data is None else data
    return json.dumps({"inputs": [tensor(windows, data=values)], **changes}).encode()


def in_bytes(windows: np.ndarray, **changes: Any) -> tuple[bytes, int]:
    parameters = {"binary_data_size": windows.nbytes}
    header = orjson.dumps({"inputs": [tensor(windows, parameters=parameters)], **changes})
    return header + windows.tobytes(), len(header)


def with_input(**changes: Any) -> bytes:
    windows = some_windows(1)
    data = windows.astype(float).ravel().tolist()
    return json.dumps({"inputs": [tensor(windows, **{"data": data, **changes})]}).encode()


def refusal(body: bytes, header_bytes: int | None = None) -> str:
    """The sentence with which the body is refused."""
    with pytest.raises((GatewayError, InvalidWindows)) as caught:
        decode_request(body, header_bytes)
    assert problem_of(caught.value).status in {400, 422}
    return problem_of(caught.value).detail


# --- requests


@pytest.mark.parametrize("n_windows", [1, 2, 5])
def test_windows_are_the_same_however_they_are_written(n_windows: int) -> None:
    windows = some_windows(n_windows)
    requests = [
        decode_request(in_json(windows), None),
        decode_request(in_json(windows, windows.astype(float).tolist()), None),
        decode_request(*in_bytes(windows)),
        decode_request(windows.tobytes(), 0),
    ]
    for request in requests:
        np.testing.assert_array_equal(request.windows, windows)
        assert request.windows.dtype == np.float32
        assert request.windows.flags.c_contiguous
        assert request.options == Options()


@pytest.mark.parametrize("pad", range(8))
def test_values_may_begin_anywhere_and_end_up_aligned(pad: int) -> None:
    body, header_bytes = in_bytes(some_windows(2), id="x" * pad)
    windows = decode_request(body, header_bytes).windows
    np.testing.assert_array_equal(windows, some_windows(2))
    assert windows.flags.aligned


def test_bytes_that_are_aligned_are_not_copied() -> None:
    body = some_windows(2).tobytes()
    assert np.shares_memory(decode_request(body, 0).windows, np.frombuffer(body, np.float32))


def test_a_header_may_hold_the_values_itself() -> None:
    body = in_json(some_windows(1))
    assert len(decode_request(body, len(body)).windows) == 1


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        "1.0",
        1.0,
        [],
        [1.0] * 2999,
        [1.0] * 3001,
        [True] * 3000,
        [None] * 3000,
        ["1"] * 3000,
        [[1.0] * 3000],
        [[1.0] * 60] * 50,
        [[[1.0] * 50] * 60],
        [[[1.0] * 60] * 49],
        [[[1.0] * 60] * 49 + [[1.0] * 59]],
        [[[1.0] * 60] * 49 + [1.0]],
        [[[1.0] * 60] * 50] * 2,
        [[[[1.0]] * 60] * 50],
        [1.0] * 2999 + [[1.0]],
        [[1.0]] + [1.0] * 2999,
    ],
)
def test_data_that_are_not_the_shape_s_numbers_are_refused(data: Any) -> None:
    assert "windows" in refusal(with_input(data=[data] if data is None else data))


@pytest.mark.parametrize("value", ["1e39", "-1e39", "1e300", "3e6", "1" + "0" * 400])
def test_numbers_beyond_all_bounds_are_refused(value: str) -> None:
    body = in_json(some_windows(1), [0.0] * 3000).replace(b"0.0", value.encode(), 1)
    refusal(body)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e6])
def test_poisoned_bytes_are_refused(value: float) -> None:
    windows = some_windows(2)
    windows[1, 49, 59] = value
    assert "finite" in refusal(*in_bytes(windows))
    assert "finite" in refusal(windows.tobytes(), 0)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_json_has_no_such_numbers(literal: str) -> None:
    assert refusal(in_json(some_windows(1), [0.0] * 3000).replace(b"0.0", literal.encode(), 1)) == (
        "the body is not JSON"
    )


@pytest.mark.parametrize(
    "shape",
    [
        None,
        [],
        [50, 60],
        [1, 60, 50],
        [0, 50, 60],
        [-1, 50, 60],
        [1, 50, 60, 1],
        [True, 50, 60],
        [1.0, 50, 60],
        [1, 50.0, 60],
        ["1", 50, 60],
        [10**30, 50, 60],
        [2, 50, 60],
        "1,50,60",
    ],
)
def test_other_shapes_are_refused(shape: Any) -> None:
    refusal(with_input(shape=shape))


def test_no_windows_at_all_are_a_matter_of_the_shape() -> None:
    assert refusal(with_input(shape=[0, 50, 60], data=[])).startswith("the shape of windows must be")


@pytest.mark.parametrize("datatype", [None, "FP64", "fp32", "INT32", "BYTES", 32, ["FP32"], ""])
def test_other_datatypes_are_refused(datatype: Any) -> None:
    assert refusal(with_input(datatype=datatype)) == "the datatype of windows must be FP32"


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        [],
        {},
        "windows",
        [None],
        [{}],
        [[]],
        [{"name": "other", "datatype": "FP32", "shape": [1, 50, 60], "data": []}],
        [{"name": ["windows"]}],
        [tensor(some_windows(1), data=[]), tensor(some_windows(1), data=[])],
    ],
)
def test_anything_but_the_one_input_is_refused(inputs: Any) -> None:
    refusal(json.dumps({"inputs": inputs}).encode())


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b'{"inputs":"\\ud800"}', b"[" * 9000]
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    refusal(body)


@pytest.mark.parametrize("size", [0, 1, 11_999, 12_001, -12_000, 24_000, 12_000.0, "12000", True, 10**40])
def test_a_wrong_binary_size_is_refused(size: Any) -> None:
    windows = some_windows(1)
    header = json.dumps({"inputs": [tensor(windows, parameters={"binary_data_size": size})]}).encode()
    refusal(header + windows.tobytes(), len(header))


@pytest.mark.parametrize("cut", [-1, 1, 12_000])
def test_bytes_that_nobody_announced_or_that_are_missing_are_refused(cut: int) -> None:
    body, header_bytes = in_bytes(some_windows(1))
    refusal(body[:-cut] if cut > 0 else body + b"\0", header_bytes)


@pytest.mark.parametrize("off", [-2, -1, 1, 2, 1000, 10**8])
def test_a_wrong_header_length_is_refused(off: int) -> None:
    body, header_bytes = in_bytes(some_windows(1))
    refusal(body, header_bytes + off)


def test_data_and_bytes_at_once_are_refused() -> None:
    windows = some_windows(1)
    both = tensor(windows, data=windows.astype(float).tolist(), parameters={"binary_data_size": windows.nbytes})
    header = json.dumps({"inputs": [both]}).encode()
    assert "either" in refusal(header + windows.tobytes(), len(header))


@pytest.mark.parametrize("size", [0, 1, WINDOW_BYTES - 4, WINDOW_BYTES + 4])
def test_bytes_alone_must_be_whole_windows(size: int) -> None:
    refusal(b"\0" * size, 0)


@pytest.mark.parametrize(
    ("parameters", "timeout_ms"),
    [({}, None), ({"timeout": 0}, None), ({"timeout": 1}, 1), ({"timeout": 1_500}, 1), ({"timeout": 2_000_000}, 2000)],
)
def test_the_timeout_is_in_microseconds(parameters: dict[str, Any], timeout_ms: int | None) -> None:
    assert decode_request(in_json(some_windows(1), parameters=parameters), None).timeout_ms == timeout_ms


@pytest.mark.parametrize(
    "parameters",
    [
        [],
        "x",
        {"timeout": -1},
        {"timeout": 1.5},
        {"timeout": "1"},
        {"timeout": True},
        {"binary_data_output": 1},
        {"use_ensemble": "true"},
        {"return_uncertainty": 0},
        {"mine": {}},
        {"mine": [1]},
    ],
)
def test_parameters_of_the_wrong_kind_are_refused(parameters: Any) -> None:
    refusal(in_json(some_windows(1), parameters=parameters))


def test_what_nobody_knows_is_ignored() -> None:
    parameters = {"sequence_id": 7, "priority": 1, "desk": "a", "weight": 0.5}
    request = decode_request(in_json(some_windows(1), parameters=parameters, model_name="x", more=[1]), None)
    assert request.options == Options()


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        "features",
        [{}],
        ["features"],
        [{"name": "predictive_entropy"}],
        [{"name": "model_name"}],
        [{"name": 1}],
        [{"name": "features"}, {"name": "features"}],
        [{"name": name} for name in OUTPUT_SHAPES] * 1000,
        [{"name": "features", "parameters": {"binary_data": 1}}],
        [{"name": "features", "parameters": {"classification": 2}}],
        [{"name": "features", "parameters": {"shared_memory_region": "x"}}],
    ],
)
def test_outputs_that_there_are_none_of_are_refused(outputs: Any) -> None:
    refusal(in_json(some_windows(1), outputs=outputs))


def test_shared_memory_is_refused_plainly() -> None:
    body = with_input(data=None, parameters={"shared_memory_region": "x", "shared_memory_byte_size": 12_000})
    assert refusal(body) == "the shared memory extensions are not supported"


def test_weights_of_no_ensemble_are_refused() -> None:
    outputs = [{"name": "ensemble_weights"}]
    assert "use_ensemble" in refusal(in_json(some_windows(1), outputs=outputs, parameters={"use_ensemble": False}))


def test_an_output_s_own_wish_overrides_the_request_s() -> None:
    outputs = [
        {"name": "aleatoric"},
        {"name": "epistemic", "parameters": {"binary_data": False}},
        {"name": "features", "parameters": {"binary_data": True}},
    ]
    for default in (True, False):
        body = in_json(some_windows(1), outputs=outputs, parameters={"binary_data_output": default})
        wanted = decode_request(body, None).wanted
        assert wanted.outputs == (("aleatoric", default), ("epistemic", False), ("features", True))


@pytest.mark.parametrize("request_id", ["x", "é ✓", "x" * MAX_ID_CHARS, "\u0000\n", '"', "</script>"])
def test_the_id_comes_back_as_it_was(request_id: str) -> None:
    wanted = decode_request(in_json(some_windows(1), id=request_id), None).wanted
    body, _ = encode_response(fake_prediction(1), wanted, "m")
    assert json.loads(body)["id"] == request_id


@pytest.mark.parametrize("request_id", [1, True, {}, [], "x" * (MAX_ID_CHARS + 1)])
def test_another_kind_of_id_or_a_giant_one_is_refused(request_id: Any) -> None:
    refusal(in_json(some_windows(1), id=request_id))


# --- anything at all

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    ["name", "datatype", "shape", "data", "parameters", "binary_data_size", "timeout", "binary_data", "id", "outputs"]
)


def _maybe(good: Any) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, at times anything."""
    return st.one_of(st.just(good), st.just(good), _JSON)


_TENSORS = st.fixed_dictionaries(
    {"name": _maybe("windows"), "datatype": _maybe("FP32"), "shape": _maybe([1, 50, 60])},
    optional={
        "data": _maybe([0.5] * 3000),
        "parameters": _maybe({"binary_data_size": WINDOW_BYTES}) | st.dictionaries(_NAMES, _JSON, max_size=3),
    },
)
_OUTPUTS = st.fixed_dictionaries(
    {"name": st.sampled_from([*OUTPUT_SHAPES, "x"]) | _JSON},
    optional={"parameters": st.dictionaries(st.sampled_from(["binary_data", "classification"]), _JSON) | _JSON},
)
_REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(_TENSORS | _JSON, max_size=2) | _JSON},
    optional={"id": _JSON, "parameters": st.dictionaries(_NAMES, _JSON) | _JSON, "outputs": st.lists(_OUTPUTS) | _JSON},
)


def decode_or_refuse(body: bytes, header_bytes: int | None) -> InferRequest | None:
    """The request, or None where it is refused; every other end fails the test."""
    try:
        return decode_request(body, header_bytes)
    except (GatewayError, ServingError) as error:
        refused = problem_of(error)
    assert refused.status in {400, 422}
    assert len(refused.body("i" * 32)) <= 4096
    return None


@settings(max_examples=150, deadline=None)
@given(request=_REQUESTS, tail=st.sampled_from([b"", b"\0" * WINDOW_BYTES, b"\xff" * WINDOW_BYTES, b"x"]), off=_JSON)
def test_any_request_is_answered_or_refused(request: dict[str, Any], tail: bytes, off: Any) -> None:
    header = json.dumps(request).encode()
    header_bytes = off if type(off) is int and 0 <= off < 10**9 else len(header)
    for length in (header_bytes, len(header), None):
        decoded = decode_or_refuse(header + tail, length)
        if decoded is not None:
            body, _ = encode_response(fake_prediction(len(decoded.windows), ALL), decoded.wanted, "m")
            assert body


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200), header_bytes=st.none() | st.integers(0, 300))
@example(b"\0" * WINDOW_BYTES, 0)
def test_any_bytes_are_answered_or_refused(body: bytes, header_bytes: int | None) -> None:
    decode_or_refuse(body, header_bytes)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_good_request_damaged_anywhere_is_answered_or_refused(data: st.DataObject) -> None:
    body, header_bytes = in_bytes(some_windows(1), id="a", outputs=[{"name": "features"}], parameters={"timeout": 5})
    position = data.draw(st.integers(0, header_bytes - 1))
    damaged = body[:position] + data.draw(st.binary(max_size=3)) + body[position + data.draw(st.integers(0, 3)) :]
    decode_or_refuse(damaged, header_bytes)


# --- responses


def parse_response(body: bytes, header_bytes: int | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document, and every output's values."""
    document = json.loads(body[:header_bytes])
    offset = len(body) if header_bytes is None else header_bytes
    arrays = {}
    for output in document["outputs"]:
        if "data" in output:
            values = np.array(output["data"], np.float32)
        else:
            size_bytes = output["parameters"]["binary_data_size"]
            values = np.frombuffer(body, "<f4", size_bytes // 4, offset)
            offset += size_bytes
        assert output["datatype"] == "FP32"
        arrays[output["name"]] = values.reshape(output["shape"])
    assert offset == len(body)
    return document, arrays


@pytest.mark.parametrize("n_windows", [1, 7])
@pytest.mark.parametrize("binary", [lambda _: True, lambda _: False, lambda index: index % 2 == 0])
def test_every_output_comes_in_its_place(n_windows: int, binary: Any) -> None:
    names = list(reversed(OUTPUT_SHAPES))
    prediction = fake_prediction(n_windows, ALL, version="3")
    wanted = Wanted(tuple((name, binary(index)) for index, name in enumerate(names)))
    body, header_bytes = encode_response(prediction, wanted, "cnn_lstm")
    document, arrays = parse_response(body, header_bytes)
    assert (document["model_name"], document["model_version"]) == ("cnn_lstm", "3")
    assert "id" not in document
    assert list(arrays) == names
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(prediction, name))


def test_rows_of_a_larger_answer_are_written_alone() -> None:
    whole = Prediction.unpack(fake_prediction(6, ALL).pack())
    wanted = Wanted(tuple((name, name != "features") for name in OUTPUT_SHAPES))
    _, arrays = parse_response(*encode_response(whole.rows(2, 5), wanted, "m"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(whole, name)[2:5])


def test_what_a_remote_service_does_not_tell_is_left_out() -> None:
    told = Options(return_uncertainty=False, use_ensemble=False)
    prediction = fake_prediction(1, told, version=None)  # type: ignore[arg-type]
    wanted = Wanted(tuple((name, True) for name in OUTPUT_SHAPES))
    document, arrays = parse_response(*encode_response(prediction, wanted, "m"))
    assert "model_version" not in document
    assert set(arrays) == {"classification_probs", "regression_pred"}


def test_the_outputs_of_a_plain_request_are_the_default_ones() -> None:
    wanted = decode_request(in_json(some_windows(1)), None).wanted
    assert wanted.outputs == tuple((name, False) for name in DEFAULT_OUTPUTS)
    assert DEFAULT_OUTPUTS == ("classification_probs", "regression_pred", "regression_uncertainty", "aleatoric")


# --- names given twice, depth, and what nobody knows


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"outputs":', '"outputs":[],"outputs":'),
        ('"id":', '"\\u0069d":"z","id":'),
        ('"shape":', '"shape":[2,50,60],"shape":'),
        ('"name": "windows"', '"name":"x","name":"windows"'),
        ('"binary_data":', '"binary_data":false,"binary_data":'),
    ],
)
@pytest.mark.parametrize("is_binary", [True, False])
def test_a_name_given_twice_is_refused(before: str, after: str, is_binary: bool) -> None:
    windows = some_windows(1)
    values = {"parameters": {"binary_data_size": windows.nbytes}} if is_binary else {"data": windows.ravel().tolist()}
    outputs = [{"name": "regression_pred", "parameters": {"binary_data": False}}]
    text = json.dumps({"id": 'a"\\', "inputs": [tensor(windows, **values)], "outputs": outputs})
    tail = windows.tobytes() if is_binary else b""
    assert decode_request(text.encode() + tail, len(text)).wanted.request_id == 'a"\\'
    assert before in text
    repeated = text.replace(before, after, 1).encode()
    assert refusal(repeated + tail, len(repeated)) == "a name is given twice"


def test_data_given_twice_are_refused() -> None:
    body = in_json(some_windows(1))
    assert refusal(body.replace(b'"data":', b'"data": [], "data":')) == "a name is given twice"


def test_text_among_the_data_is_told_as_such() -> None:
    assert refusal(in_json(some_windows(1), [0.0] * 2999 + ["1"])) == "the data of windows must be numbers"


@pytest.mark.parametrize("depth", [9, 100, 900])
def test_what_nobody_knows_may_not_be_deep(depth: int) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    assert "deep" in refusal(in_json(some_windows(1), unknown=deep))


def test_what_nobody_knows_may_not_be_long() -> None:
    assert "values" in refusal(in_json(some_windows(1), unknown=[0] * 20_000))
