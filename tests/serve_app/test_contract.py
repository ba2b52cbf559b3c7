import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import contract
from serve_app.contract import InvalidWindows, ModelOutputInvalid, Prediction, as_windows


def prediction(rows: int = 3, *, uncertainty: bool = True, features: int | None = None) -> Prediction:
    rng = np.random.default_rng(rows)

    def column() -> np.ndarray:
        return rng.random(rows, dtype=np.float32)

    return Prediction(
        classification_probs=rng.dirichlet([1, 1, 1], rows).astype(np.float32),
        regression_pred=column(),
        regression_uncertainty=column() if uncertainty else None,
        aleatoric=column() if uncertainty else None,
        epistemic=column() if uncertainty else None,
        predictive_entropy=column() if uncertainty else None,
        ensemble_weights=np.full((rows, 3), 1 / 3, np.float32),
        features=None if features is None else rng.random((rows, features), dtype=np.float32),
        model_name="cnn_lstm",
        model_version="1",
        model_time_ms=1.25,
        batch_wait_ms=0.5,
    )


def assert_equal(left: Prediction, right: Prediction) -> None:
    for name in left.__slots__:
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            assert one == other, name


@given(rows=st.integers(1, 40), uncertainty=st.booleans(), features=st.none() | st.integers(1, 9))
def test_a_packed_prediction_comes_back_as_it_was(rows: int, uncertainty: bool, features: int | None) -> None:
    original = prediction(rows, uncertainty=uncertainty, features=features)
    assert_equal(Prediction.unpack(original.pack()), original)


@pytest.mark.parametrize("dtype", ["U3", object, complex, bool, "datetime64[D]"])
def test_an_array_that_holds_no_real_numbers_is_refused(dtype: str) -> None:
    with pytest.raises(InvalidWindows, match="numbers"):
        as_windows(np.ones((50, 60), np.int64).astype(dtype))


def test_what_one_part_lacks_the_whole_lacks() -> None:
    whole = prediction(4)
    parts = [whole.rows(0, 2), replace(whole.rows(2, 4), aleatoric=None)]
    for order in (parts, parts[::-1]):
        joined = Prediction.join(order)
        assert joined.aleatoric is None
        assert joined.epistemic is not None
        assert len(joined.epistemic) == 4


def test_a_model_without_a_name_survives_the_way_between_processes() -> None:
    nameless = replace(prediction(), model_name=None, model_version=None)
    assert_equal(Prediction.unpack(nameless.pack()), nameless)


def test_unpacked_arrays_are_aligned_for_float32() -> None:
    assert Prediction.unpack(prediction().pack()).classification_probs.flags.aligned


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_rows_cut_apart_join_to_the_whole(cuts: list[int]) -> None:
    whole = prediction(sum(cuts), features=4)
    edges = np.cumsum([0, *cuts])
    assert_equal(Prediction.join([whole.rows(a, b) for a, b in itertools.pairwise(edges)]), whole)


def test_a_single_window_gets_a_batch_axis() -> None:
    assert as_windows(np.zeros((50, 60))).shape == (1, 50, 60)


def test_windows_that_need_no_change_are_not_copied() -> None:
    windows = np.zeros((2, 50, 60), np.float32)
    assert np.shares_memory(as_windows(windows), windows)


@pytest.mark.parametrize("shape", [(60, 50), (1, 60, 50), (50,), (0, 50, 60), (1, 1, 50, 60), (2, 50, 59), ()])
def test_any_other_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidWindows):
        as_windows(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1.1e6])
def test_one_unusable_value_anywhere_refuses_the_windows(value: float) -> None:
    windows = np.zeros((2, 50, 60))
    windows[1, 49, 59] = value
    with pytest.raises(InvalidWindows):
        as_windows(windows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regression_pred", np.nan),
        ("aleatoric", np.inf),
        ("classification_probs", 0.9),
        ("classification_probs", -0.1),
        ("regression_uncertainty", -1.0),
    ],
)
def test_an_answer_nobody_may_act_on_is_refused(field: str, value: float) -> None:
    bad = prediction()
    getattr(bad, field)[1] = value
    with pytest.raises(ModelOutputInvalid):
        bad.check()
    prediction().check()


def test_every_error_can_cross_a_process_border_by_its_code() -> None:
    def tree(error: type[contract.ServingError]) -> set[type[contract.ServingError]]:
        return {error}.union(*(tree(below) for below in error.__subclasses__()))

    ours = {error for error in tree(contract.ServingError) if error.__module__ == contract.__name__}
    assert set(contract.ERRORS_BY_CODE.values()) == ours
    assert all(error.code == code for code, error in contract.ERRORS_BY_CODE.items())


def test_the_packed_form_starts_with_the_length_of_its_head() -> None:
    packed = prediction().pack()
    (length,) = struct.unpack_from("<I", packed)
    assert packed[4:5] == b"{"
    assert packed[4 : 4 + length].rstrip().endswith(b"}")
