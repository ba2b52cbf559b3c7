from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.codec import decode_flags, decode_float32, decode_json
from app.errors import GatewayError
from serve_app.contract import InvalidWindows, Options

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


def test_raw_windows_are_not_copied() -> None:
    body = np.zeros((2, *SHAPE), "<f4").tobytes()
    windows = decode_float32(body, b"").windows
    assert windows.__array_interface__["data"][0] == np.frombuffer(body, "<f4").__array_interface__["data"][0]


def test_flags_default_to_the_contract_s() -> None:
    assert decode_flags(b"") == Options()
    assert decode_flags(b"use_ensemble=false&return_features=true") == Options(use_ensemble=False, return_features=True)
