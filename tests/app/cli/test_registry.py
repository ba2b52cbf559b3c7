"""`sluice registry` as a process: from a model folder to a version that is served."""

from __future__ import annotations

from pathlib import Path

from tests.app.cli.command import EX_CONFIG, assert_one_plain_line, sluice
from tests.serve_app.model_files import random_state, saved, system_call


def test_an_old_model_folder_is_published_signed_and_served_by_its_alias(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.pth").write_bytes(saved(random_state(mc_samples=2)))
    (tmp_path / "old" / "config.json").write_text('{"input_dim": 50, "device": "cuda", "mc_samples": 2}')
    (tmp_path / "old" / "notes.txt").write_text("mine")
    signed = {"MODEL_REGISTRY_PATH": str(tmp_path / "models"), "GATEWAY_REGISTRY_KEY_FILE": "registry.pub"}
    keys = sluice("registry", "keygen", ".", cwd=tmp_path)
    assert "GATEWAY_REGISTRY_KEY_FILE=registry.pub" in keys.stdout
    assert_one_plain_line(sluice("registry", "publish", "old", cwd=tmp_path, **signed), EX_CONFIG, "--sign-with")
    options = ("--version", "7", "--alias", "stable", "--sign-with", "registry.key")
    result = sluice("registry", "publish", "old", *options, cwd=tmp_path, **signed)
    assert result.stdout.splitlines() == ["Published cnn_lstm 7", "cnn_lstm: stable is now version 7"], result.stderr
    assert "Left out: notes.txt" in result.stderr
    assert "signature is good" in sluice("registry", "verify", "--version", "stable", cwd=tmp_path, **signed).stdout


def test_an_evil_model_folder_is_one_line_and_no_version(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.pth").write_bytes(system_call(tmp_path / "canary"))
    result = sluice("registry", "publish", "old", cwd=tmp_path, MODEL_REGISTRY_PATH=str(tmp_path / "models"))
    assert result.returncode == 1
    assert "wants to call posix.system" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "models").exists()
