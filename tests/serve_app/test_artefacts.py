from __future__ import annotations

import ast
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from serve_app import artefacts
from serve_app.artefacts import import_folder
from serve_app.contract import Options
from serve_app.engine import load_engine
from serve_app.engine.weights import expected_tensors
from serve_app.registry import ArtefactRejected, Registry
from tests.serve_app.model_files import EVIL, SMALL, random_state, saved

ROOT = Path(__file__).parents[2]
WINDOWS = np.random.default_rng(3).standard_normal((3, 50, 60), dtype=np.float32)


@pytest.fixture(scope="module", autouse=True)
def torch_has_imported_what_it_imports_late() -> None:
    expected_tensors(SMALL)  # tens of megabytes that no model file is to blame for


def old_folder(path: Path, weights: bytes, config: Any = SMALL) -> Path:
    path.mkdir()
    (path / "model.pth").write_bytes(weights)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("evil", EVIL, ids=lambda evil: evil.__name__)
def test_an_evil_file_is_refused_with_its_reason_and_runs_nothing(
    tmp_path: Path, evil: Callable[[Path], bytes]
) -> None:
    canary = tmp_path / "canary"
    folder = old_folder(tmp_path / "evil", evil(canary))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtefactRejected, match=EVIL[evil]):
        import_folder(folder)
    assert not canary.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 64 * 1024


@pytest.mark.parametrize("evil", [evil for evil in EVIL if evil.__name__ in ("bare_pickle", "evaluation")])
def test_the_canary_would_sing_if_the_code_ran(tmp_path: Path, evil: Callable[[Path], bytes]) -> None:
    canary = tmp_path / "canary"
    data = evil(canary)
    (tmp_path / "model.pth").write_bytes(data)
    if evil.__name__ == "bare_pickle":
        pickle.loads(data)
    else:
        torch.load(tmp_path / "model.pth", weights_only=False)
    assert canary.exists()


def test_torch_load_is_never_called_without_weights_only() -> None:
    calls = [
        node
        for package in ("app", "serve_app", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert [ast.unparse(call.func) for call in calls] == ["torch.load"]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}["weights_only"] == "True"


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict"])
def test_an_old_folder_answers_as_its_weights_did(tmp_path: Path, wrapper: str | None) -> None:
    state = random_state(mc_samples=32)
    document = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    imported = import_folder(old_folder(tmp_path / "old", saved(document), config=None))
    registry = Registry(tmp_path / "models")
    version = registry.publish("cnn_lstm", files=imported.files, **imported.facts)
    artefact = registry.load("cnn_lstm")
    assert registry.verify("cnn_lstm").training is None
    assert (version, artefact.config["width"]) == ("1", 32), "without config.json the sizes are the defaults"
    for name, tensor in safetensors.torch.load(artefact.weights).items():
        assert torch.equal(tensor, state[name])
    load_engine(artefact).predict(WINDOWS, Options()).check()
    card = imported.files["CARD.md"].decode()
    assert "not known" in card
    assert "`model.pth`" in card


def test_parameters_and_shared_memory_are_taken_as_plain_tensors(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(random_state())
    both = torch.zeros(10)
    state["highway.bias"] = torch.nn.Parameter(both[::2])
    imported = import_folder(old_folder(tmp_path / "old", saved(state)))
    assert safetensors.torch.load(imported.files["model.safetensors"])["highway.bias"].is_contiguous()


def test_the_old_config_is_read_and_its_device_dropped(tmp_path: Path) -> None:
    old = {
        "model_type": "CNNLSTMHybridModel",
        "input_dim": 50,
        "output_dim": 4,
        "sequence_length": 60,
        "device": "cuda",
        **SMALL,
    }
    imported = import_folder(old_folder(tmp_path / "old", saved(random_state()), config=old))
    config = json.loads(imported.files["config.json"])
    assert (config["width"], config["n_features"]) == (8, 50)
    assert "device" not in config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "Transformer"}, "model_type"),
        ({"input_dim": 51}, "input_dim"),
        ({"output_dim": 3}, "output_dim"),
        ({"sequence_length": 61}, "sequence_length"),
        ({"n_steps": 61}, "windows of 50 by 61"),
        ({"hidden": 1}, "hidden"),
        ({"width": 9}, "attention_heads"),
        ({"channels": 1 << 40}, "describes no model|bytes; at most"),
        ({"head_hidden": 1 << 26}, "bytes; at most"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = old_folder(tmp_path / "old", saved(random_state()), config={**SMALL, **change})
    with pytest.raises(ArtefactRejected, match=reason):
        import_folder(folder)


def test_our_own_layout_passes_through_and_strangers_stay_behind(tmp_path: Path) -> None:
    weights = safetensors.torch.save(random_state())
    for name, data in {
        "model.safetensors": weights,
        "config.json": json.dumps(SMALL).encode(),
        "notes.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    imported = import_folder(tmp_path)
    assert imported.files["model.safetensors"] == weights
    assert imported.left_out == ("notes.txt",)


def test_a_sealed_folder_brings_its_facts_and_must_be_whole(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    shipped = Registry(ROOT / "models").verify("cnn_lstm", "1")
    imported = import_folder(ROOT / "models" / "cnn_lstm" / "1")
    registry.publish("cnn_lstm", files=imported.files, **imported.facts)
    copy = registry.verify("cnn_lstm")
    assert (copy.training, copy.files) == (shipped.training, shipped.files)
    (tmp_path / "models" / "cnn_lstm" / "1" / "CARD.md").write_text("finer words")
    with pytest.raises(ArtefactRejected, match=r"CARD\.md is not the file"):
        import_folder(tmp_path / "models" / "cnn_lstm" / "1")


def test_a_folder_without_one_set_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactRejected, match="cannot be read"):
        import_folder(tmp_path / "none")
    with pytest.raises(ArtefactRejected, match="has 0 of the two"):
        import_folder(tmp_path)
    (tmp_path / "model.pth").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactRejected, match="has 2 of the two"):
        import_folder(tmp_path)
    (tmp_path / "model.pth").unlink()
    with pytest.raises(ArtefactRejected, match=r"config\.json is missing"):
        import_folder(tmp_path)


def test_what_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "old", b"")
    os.truncate(folder / "model.pth", artefacts.MAX_VERSION_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ArtefactRejected, match="at most"):
        import_folder(folder)


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(saved(random_state()))
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "model.pth").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtefactRejected, match="plain file"):
        import_folder(folder)
