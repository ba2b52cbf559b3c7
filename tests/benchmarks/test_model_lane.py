"""The model lane: the models are those of the cards, every engine computes them, and all are timed alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.model_lane import BLOCK, SHAPES, Shape, build, load_engines, run, time_in_turns

SMALL = Shape(steps=5, features=4, layers=2, units=3, parameters=4 * (3 * 7 + 3) + 4 * (3 * 6 + 3) + 4)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_parameters_are_those_of_the_card(shape: Shape) -> None:
    assert build(shape).n_params == shape.parameters


def test_a_model_that_is_not_the_cards_is_refused() -> None:
    with pytest.raises(ValueError, match="its card says 160902"):
        build(dataclasses.replace(SHAPES[0], parameters=160_902))


def test_every_engine_answers_what_the_model_does() -> None:
    shape = SHAPES[0]
    window = np.random.default_rng(1).standard_normal((1, shape.steps, shape.features), dtype=np.float32)
    engines = load_engines(build(shape), window)
    assert list(engines) == ["null", "torch, eager", "torch, traced", "onnxruntime", "openvino"]
    expected = engines["torch, eager"](window)
    for name in list(engines)[2:]:
        np.testing.assert_allclose(engines[name](window), expected, atol=1e-6, rtol=1e-5, err_msg=name)


def test_engines_take_turns_in_blocks_and_each_begins_once() -> None:
    asked: list[str] = []
    engines = {name: (lambda window, name=name: asked.append(name)) for name in ("a", "b")}
    window = np.zeros((1, 1, 1), np.float32)
    times = time_in_turns(engines, window, 2 * BLOCK, clock=iter(range(0, 10**9, 5000)).__next__)
    assert asked[-4 * BLOCK :] == ["a"] * BLOCK + ["b"] * BLOCK + ["b"] * BLOCK + ["a"] * BLOCK
    assert {name: (len(of_engine), of_engine.max()) for name, of_engine in times.items()} == dict.fromkeys(
        "ab", (40, 5)
    )


def test_a_run_has_a_row_for_every_engine_and_the_null_model() -> None:
    rows = run(calls=BLOCK, shapes=[SMALL])
    assert rows[0]["engine"] == "null"
    assert len(rows) == 5
    assert all(0 < row["p50_us"] <= row["p99_us"] <= row["max_us"] for row in rows)
    assert {row["label"] for row in rows} == {"STAC-shaped, unaudited"}
