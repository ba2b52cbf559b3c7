from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.codec import decode_flags, decode_float32, decode_json
from app.errors import GatewayError
from serve_app.contract import InvalidWindows, Options
from tests.app.api.test_numbers import cpu_s

SHAPE = (50, 60)


def window(value: Any = 0.5) -> list[list[Any]]:
    return [[value] * 60 for _ in range(50)]


@given(
    st.lists(
        st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True),
        min_size=1,
        max_size=40,
    )
)
def test_decoded_json_is_the_nearest_float32_of_every_number(some: list[float]) -> None:
    values = [some[i % len(some)] for i in range(3000)]
    rows = [values[start : start + 60] for start in range(0, 3000, 60)]
    batch = decode_json(json.dumps({"data": rows}).encode())
    expected = np.array(values, np.float64).astype(np.float32).reshape(1, *SHAPE)
    np.testing.assert_array_equal(batch.windows, expected)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=3),
        max_leaves=20,
    )
)
def test_data_of_any_kind_are_refused_in_an_orderly_way(value: Any) -> None:
    with pytest.raises((GatewayError, InvalidWindows)):
        decode_json(json.dumps({"data": value}, allow_nan=False, default=str).encode() if _plain(value) else b"NaN")


def _plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_an_orderly_way(body: bytes) -> None:
    with pytest.raises((GatewayError, InvalidWindows)):
        decode_json(body)


@given(
    st.integers(0, 49), st.integers(0, 59), st.sampled_from([True, False, None, "1", "NaN", [], [1.0], {}, {"1": 1}])
)
def test_one_wrong_value_among_thousands_is_found_where_it_is(feature: int, step: int, wrong: Any) -> None:
    data = window()
    data[feature][step] = wrong
    with pytest.raises(GatewayError) as caught:
        decode_json(json.dumps({"data": data}).encode())
    assert caught.value.members == {"pointer": f"/data/{feature}/{step}"}


@pytest.mark.parametrize(
    ("data", "pointer", "fault"),
    [
        ("a" * 9, "/data", "must be a list"),
        ("", "/data", "must be a list"),
        ({"0": window()}, "/data", "must be a list"),
        (5, "/data", "must be a list"),
        (["a" * 60] * 50, "/data/0", "must be a list"),
        ([{}], "/data/0", "must be a list"),
        ([[1] * 60] * 49 + ["a" * 60], "/data/49", "must be a list"),
        ([[1] * 60] * 49 + [[1] * 59], "/data/49", "must hold 60 numbers"),
        ([[1] * 60] * 49 + [[1] * 59 + [[1]]], "/data/49/59", "must be a number"),
        ([window(), window(), "a" * 50], "/data/2", "must be a list"),
        ([window(), ["a" * 60] * 50], "/data/1/0", "must be a list"),
        ([window(), window()[:49]], "/data/1", "must hold 50 lists"),
        ([window(), window(), [[1] * 60] * 49 + [[1] * 61]], "/data/2/49", "must hold 60 numbers"),
        ([window(1), window(0), [[1] * 60] * 49 + [[1] * 59 + [True]]], "/data/2/49/59", "must be a number"),
        ([window(1), window(0), [[1] * 60] * 49 + [[1] * 59 + [None]]], "/data/2/49/59", "must be a number"),
    ],
)
def test_what_is_no_window_is_said_with_its_place(data: Any, pointer: str, fault: str) -> None:
    with pytest.raises(GatewayError) as caught:
        decode_json(json.dumps({"data": data}).encode())
    assert (caught.value.detail, caught.value.members) == (fault, {"pointer": pointer})


@pytest.mark.parametrize("data", [[], [[]], [[[]]], window()[:49], [row[:59] for row in window()], [window()[:10]] * 3])
def test_windows_of_one_other_shape_are_told_the_shape(data: Any) -> None:
    with pytest.raises(InvalidWindows, match=r"shape \(50, 60\)"):
        decode_json(json.dumps({"data": data}).encode())


MIB = 1 << 20
ONES = json.dumps(window(1), separators=(",", ":")).encode()
MANY_ONES = b",".join([ONES] * 170)
DEEP = b"[" * 300 + b"]" * 300


@pytest.mark.parametrize(
    "data",
    [
        b'"' + b"a" * (MIB - 99) + b'"',
        b'"' + "你".encode() * (MIB // 3 - 99) + b'"',
        b'["' + "你".encode() * (MIB // 3 - 99) + b'"]',
        b'[[[1]],"' + b"a" * (MIB - 99) + b'"]',
        b"[[" + b"1," * (MIB // 2 - 99) + b"true]]",
        b"[[" + b"1," * (MIB // 2 - 99) + b"null]]",
        b"[[" + b"1," * (MIB // 2 - 999) + DEEP + b"]]",
        b"[" + MANY_ONES + b"]",
        b"[" + MANY_ONES[:-3] + b"true]]]",
        b"[" + MANY_ONES[:-3] + b"null]]]",
        b"[" + MANY_ONES[:-4] + b"]]]",
    ],
)
def test_no_body_of_the_largest_size_holds_the_event_loop_for_long(data: bytes) -> None:
    body = b'{"data":' + data + b"}"
    assert len(body) <= MIB

    def decode() -> None:
        with contextlib.suppress(GatewayError):
            decode_json(body)

    # Parsing as many numbers as there can be takes 12 ms: so this is within the 50 ms for which the event loop may be
    # held, and a machine that is busy with others slows both.
    assert cpu_s(decode) < 4 * cpu_s(lambda: orjson.loads(b"[" + MANY_ONES + b"]"))


def test_raw_windows_are_not_copied() -> None:
    body = np.zeros((2, *SHAPE), "<f4").tobytes()
    windows = decode_float32(body, b"").windows
    assert windows.__array_interface__["data"][0] == np.frombuffer(body, "<f4").__array_interface__["data"][0]


def test_flags_default_to_the_contract_s() -> None:
    assert decode_flags(b"") == Options()
    assert decode_flags(b"use_ensemble=false&return_features=true") == Options(use_ensemble=False, return_features=True)
