from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.numbers import as_float32

NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)


@given(st.lists(NUMBERS))
def test_numbers_become_what_numpy_makes_of_them(values: list[Any]) -> None:
    with np.errstate(over="ignore"):
        expected = np.array(values, np.float64).astype(np.float32)
    array = as_float32(values)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected)


@given(st.lists(NUMBERS), st.sampled_from([True, False, None, "1", "", [], [1.0], {}]), st.lists(NUMBERS))
def test_anything_else_is_refused_wherever_it_stands(before: list[Any], value: Any, after: list[Any]) -> None:
    with pytest.raises(TypeError):
        as_float32([*before, value, *after])


def test_zeros_and_ones_are_numbers() -> None:
    assert as_float32([0, 1, 0.0, 1.0, -0.0]).tolist() == [0, 1, 0, 1, 0]


def test_what_is_beyond_float32_is_infinite() -> None:
    assert as_float32([1e300, -1e300]).tolist() == [np.inf, -np.inf]
