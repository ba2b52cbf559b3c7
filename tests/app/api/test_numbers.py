from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.numbers import as_float32, find_no_number, outline, rows_as_float32

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


NO_NUMBERS = st.sampled_from([True, False, None, "1", "", ",", "e", [], [1.0], [[1, 2], [3]], {}, {"1": 1}])


@given(st.lists(NUMBERS | NO_NUMBERS))
def test_the_first_that_is_no_number_is_found(values: list[Any]) -> None:
    wrong = [index for index, value in enumerate(values) if type(value) not in {int, float}]
    assert find_no_number(values) == (wrong[0] if wrong else None)


@pytest.mark.parametrize("before", [[], [1], [1.5, -2e30, 3], [1, 2, 3, 4]])
@pytest.mark.parametrize("after", [[], [1], [1, None, 2.5]])
def test_it_is_found_though_it_is_nested_deeper_than_can_be_written(before: list[Any], after: list[Any]) -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    assert outline(deep) is None
    assert find_no_number([*before, deep, *after]) == len(before)


def test_an_outline_tells_numbers_in_their_places_from_everything_else() -> None:
    assert outline([[1, -2.5e-300], [3e300, 2**64 - 1]]) == b"[[,],[,]]"
    assert outline([1, True, None, "12", {"1": 2}]) != outline([1, 2, 3, 4, 5])


@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("value", [0, 1, 1.0, 2.5])
def test_truth_is_no_number_though_there_be_thousands_of_ones_beside_it(wrong: bool, value: float) -> None:
    rows = [[value] * 60 for _ in range(100)]
    assert rows_as_float32(rows).tolist() == rows
    rows[70][7] = wrong
    with pytest.raises(TypeError):
        rows_as_float32(rows)


@pytest.mark.parametrize("rows", [[[1, 2], [3]], [[1], [2, 3]], [[], [1]], [[1], []]])
def test_rows_have_one_length(rows: list[list[int]]) -> None:
    with pytest.raises(TypeError):
        rows_as_float32(rows)
    assert rows_as_float32([[1, 2, 3], [4, 5, 6]]).shape == (2, 3)


def cpu_s(work: Callable[[], object]) -> float:
    """The least of seven measurements of the process's own time, in seconds."""
    times = []
    for _ in range(7):
        started_at = time.process_time()
        work()
        times.append(time.process_time() - started_at)
    return min(times)


def test_ones_take_hardly_longer_than_twos() -> None:
    ones, twos = [1] * 500_000, [2] * 500_000
    assert cpu_s(lambda: as_float32(ones)) < 2 * cpu_s(lambda: as_float32(twos))
