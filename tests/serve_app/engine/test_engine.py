"""The table of engines: names, extras, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from serve_app import engine as engines
from serve_app import extras
from serve_app.engine import EngineNotInstalled, load_engine
from serve_app.engine.exact import ExactEngine
from serve_app.engine.onnx_runtime import OnnxRuntimeEngine
from serve_app.engine.open_vino import OpenVinoEngine
from serve_app.serve_config import STUB_ENGINES, EngineName
from tests.serve_app.engine.made import shipped

ROOT = Path(__file__).parents[3]


def test_an_unknown_engine_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="known are auto, faulty, noop, onnxruntime, openvino, openvino-bf16, sleep, torch"
    ):
        load_engine(shipped(), engine="magic")


def test_only_engines_without_a_model_need_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the torch engine needs an artefact"):
        load_engine(None)
    (fault_file := tmp_path / "fault.json").write_text("{}")
    stubs = [load_engine(None, engine=name, fault_file=fault_file).model_name for name in engines.WITHOUT_ARTEFACT]
    assert stubs == ["noop", "sleep", "faulty"]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-bf16"])
def test_an_engine_whose_library_is_absent_names_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda library: None)
    with pytest.raises(EngineNotInstalled, match=rf"pip install 'sluice\[{name.split('-', maxsplit=1)[0]}\]'$"):
        load_engine(shipped(), engine=name)


def test_without_the_extras_auto_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda library: None)
    assert load_engine(shipped(), engine="auto").name == "torch"


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_for_cpu_refuses_another_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"the {name} engine runs on cpu only"):
        load_engine(shipped(), engine=name, device="cuda")


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_exact_is_taken_by_every_engine(name: str) -> None:
    engine = load_engine(shipped(), engine=name, exact=True)
    assert isinstance(engine, ExactEngine)
    assert (engine.name, engine.remark) == (name, "exact")


def test_a_setting_takes_every_engine_and_no_other() -> None:
    assert set(get_args(EngineName)) == set(engines.ENGINES)
    assert set(STUB_ENGINES) == set(engines.WITHOUT_ARTEFACT)


def test_optional_engines_take_one_thread_where_they_are_given_one() -> None:
    # Asked of the libraries, which take every core by default: what is really busy depends on the rest of the machine.
    onnx = load_engine(shipped(), engine="onnxruntime", threads=1)
    assert isinstance(onnx, OnnxRuntimeEngine)
    assert onnx._session.get_session_options().intra_op_num_threads == 1
    openvino = load_engine(shipped(), engine="openvino", threads=1)
    assert isinstance(openvino, OpenVinoEngine)
    assert openvino._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1


def test_the_default_engine_imports_no_optional_library() -> None:
    code = (
        "import sys, serve_app.engine as engines\n"
        "from pathlib import Path\n"
        "from serve_app.registry import Registry\n"
        "engines.load_engine(Registry(Path('models')).load('cnn_lstm'))\n"
        "print({'onnx', 'onnxruntime', 'openvino'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "set()\n", result.stderr
