"""The engine that fails on purpose does what its file says, from the next pass on."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.contract import FloatArray, ModelOutputInvalid, Options, Prediction
from serve_app.engine import Engine, faulty, load_engine

WINDOWS = np.zeros((4, 50, 60), np.float32)


class Told:
    """The engine and the file that tells it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "fault.json"
        self.tell()
        self.engine: Engine = load_engine(None, engine="faulty", fault_file=self._file)

    def tell(self, **fault: Any) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(fault))
        new.rename(self._file)

    def break_file(self) -> None:
        self._file.write_text('{"behaviour": "ra')

    def predict(self, windows: FloatArray = WINDOWS) -> Prediction:
        return self.engine.predict(windows, Options())


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def test_without_a_fault_it_answers(told: Told) -> None:
    told.predict().check()


def test_a_file_that_changes_holds_from_the_next_pass_on(told: Told) -> None:
    told.tell(behaviour="raise")
    with pytest.raises(RuntimeError, match="told to fail"):
        told.predict()
    told.tell(behaviour="ok")
    told.predict().check()


def test_nan_spoils_all_rows_and_with_a_mark_those_that_bear_it(told: Told) -> None:
    windows = WINDOWS.copy()
    windows[2, 0, 0] = 13
    told.tell(behaviour="nan", mark=13)
    answer = told.predict(windows)
    with pytest.raises(ModelOutputInvalid):
        answer.rows(2, 3).check()
    answer.rows(0, 2).check()
    answer.rows(3, 4).check()
    told.tell(behaviour="nan")
    assert np.isnan(told.predict().classification_probs).all()


def test_memory_runs_out_for_large_batches_only_where_a_size_is_given(told: Told) -> None:
    told.tell(behaviour="oom", above_windows=2)
    told.predict(WINDOWS[:2]).check()
    with pytest.raises(torch.OutOfMemoryError):
        told.predict(WINDOWS[:3])


def test_only_every_so_manieth_pass_misbehaves(told: Told) -> None:
    told.tell(behaviour="nan", every=3)
    assert [bool(np.isnan(told.predict().regression_pred).any()) for _ in range(6)] == [False, False, True] * 2


def test_it_takes_as_long_as_it_is_told(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(faulty.time, "sleep", slept.append)
    told.tell(ms=20)
    told.predict()
    assert slept == [0.02]


def test_it_hangs_until_it_is_told_otherwise(told: Told) -> None:
    told.tell(behaviour="hang")
    answers: list[Prediction] = []
    hanging = threading.Thread(target=lambda: answers.append(told.predict()))
    hanging.start()
    hanging.join(0.05)
    assert not answers
    told.tell(behaviour="ok")
    hanging.join(5)
    assert len(answers) == 1


def test_it_ends_its_process(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(faulty.os, "_exit", codes.append)
    told.tell(behaviour="exit")
    told.predict()
    assert codes == [1]


def test_half_a_file_changes_nothing_while_it_runs_and_is_refused_at_its_loading(told: Told) -> None:
    told.tell(behaviour="raise")
    with pytest.raises(RuntimeError):
        told.predict()
    told.break_file()
    with pytest.raises(RuntimeError):
        told.predict()
    with pytest.raises(ValueError, match="cannot be read"):
        load_engine(None, engine="faulty", fault_file=told._file)


def test_without_a_file_it_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a fault file"):
        load_engine(None, engine="faulty")


def test_its_version_is_that_of_its_loading(told: Told, tmp_path: Path) -> None:
    (tmp_path / "seven.json").write_text('{"version": "7"}')
    seven = load_engine(None, engine="faulty", fault_file=tmp_path / "seven.json")
    assert seven.predict(WINDOWS, Options()).model_version == "7"
    assert told.predict().model_version == "0"


def test_in_production_it_is_refused_by_the_process_that_would_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fault.json").write_text("{}")
    monkeypatch.setenv("PROD", "1")
    with pytest.raises(ValueError, match="PROD=1"):
        load_engine(None, engine="faulty", fault_file=tmp_path / "fault.json")
    assert load_engine(None, engine="noop").name == "noop"
