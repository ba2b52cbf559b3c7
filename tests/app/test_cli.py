"""The command line as a process: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.auth import Key, KeySet, TokenVerifier
from app.cli import _require_free_port
from serve_app.signing import generate
from tests.serve_app.model_files import random_state, saved, system_call

SECRET = "vR3kQ0mZy8Tn5LwXc7HdFgJ2sBpEuA9iKoNqWxYz4Mh6"
EX_CONFIG = 78
MODELS = Path(__file__).parents[2] / "models"


def sluice(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *words],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_plain_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("sluice: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_token_prints_one_token_that_the_gateway_takes_and_nothing_else(tmp_path: Path) -> None:
    result = sluice("token", "--sub", "desk", "--scope", "predict ops", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (token,) = result.stdout.splitlines()
    verifier = TokenVerifier(KeySet({None: Key.hs256(SECRET.encode())}), issuer="sluice", audience="sluice")
    principal = verifier.verify(token)
    assert (principal.subject, principal.scopes) == ("desk", {"predict", "ops"})


def test_without_a_secret_there_is_one_line_that_says_so(tmp_path: Path) -> None:
    assert_one_plain_line(sluice("token", "--sub", "desk", cwd=tmp_path), EX_CONFIG, "secret")
    assert_one_plain_line(sluice("serve", cwd=tmp_path), EX_CONFIG, "secret")


def test_a_taken_port_is_one_line_that_names_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = sluice("serve", "--port", str(port), cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    assert_one_plain_line(result, EX_CONFIG, str(port), f"PORT={port + 1}")


def test_port_0_is_a_port_that_can_be_told() -> None:
    assert _require_free_port("127.0.0.1", 0) > 0


def test_a_missing_model_is_one_line_that_names_the_registry(tmp_path: Path) -> None:
    result = sluice("serve", "--port", "0", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    assert_one_plain_line(result, EX_CONFIG, "no model", "models")


def test_a_damaged_state_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    state = tmp_path / ".run" / "state"
    state.mkdir(parents=True)
    (state / "rollout.json").write_text("{")
    environment = {"GATEWAY_JWT_SECRET": SECRET, "MODEL_REGISTRY_PATH": str(MODELS)}
    assert_one_plain_line(sluice("serve", "--port", "0", cwd=tmp_path, **environment), EX_CONFIG, "rollout.json")


def test_a_weak_secret_is_refused_and_not_printed(tmp_path: Path) -> None:
    result = sluice("serve", cwd=tmp_path, GATEWAY_JWT_SECRET="hunter2hunter2")
    assert_one_plain_line(result, EX_CONFIG, "32 bytes")
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("predict", "--symbol", "TSLA"), "MSFT"),
        (("predict", "--symbol", "MSFT", "--date", "soon"), "YYYY-MM-DD"),
        (("predict", "--symbol", "MSFT", "--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("rollout", "show", "--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("registry", "verify"), "registry"),
        (("token", "--sub", "desk", "--scope", "Bad!"), "scopes"),
        (("token", "--sub", ""), "name"),
        (("rollout", "show", "--token", "☃"), "token"),
    ],
)
def test_what_an_operator_can_mend_is_one_plain_line(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    assert_one_plain_line(sluice(*words, cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET), 1, expected)


def test_deploy_without_a_cluster_is_one_plain_line(tmp_path: Path) -> None:
    environment = {"GATEWAY_RAY_DASHBOARD_URL": "http://127.0.0.1:9", "MODEL_REGISTRY_PATH": str(MODELS)}
    assert_one_plain_line(sluice("deploy", cwd=tmp_path, **environment), 1, "Ray dashboard")


def test_an_unknown_profile_is_refused_before_anything_is_put(tmp_path: Path) -> None:
    result = sluice("deploy", "--profile", "yolo", cwd=tmp_path, MODEL_REGISTRY_PATH=str(MODELS))
    assert_one_plain_line(result, EX_CONFIG, "profile")


def test_a_deployed_alias_is_pinned_to_its_version(tmp_path: Path) -> None:
    result = sluice("deploy", "--dry-run", cwd=tmp_path, MODEL_REGISTRY_PATH=str(MODELS))
    (application,) = json.loads(result.stdout)["applications"]
    assert application["deployments"][0]["user_config"]["version"].isdecimal()


def test_help_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = "import sys, app.cli; sys.exit(bool({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0
    print(f"imported in {time.monotonic() - started:.2f} s")


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


def test_an_unsigned_model_is_not_served_where_a_key_is_set(tmp_path: Path) -> None:
    generate(tmp_path / "registry.key", tmp_path / "registry.pub")
    where = {"MODEL_REGISTRY_PATH": str(MODELS), "GATEWAY_REGISTRY_KEY_FILE": "registry.pub"}
    serving = sluice("serve", "--port", "0", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET, **where)
    assert_one_plain_line(serving, EX_CONFIG, "is not signed")
    where["GATEWAY_REGISTRY_KEY_FILE"] = "registry.key"
    assert_one_plain_line(sluice("registry", "verify", cwd=tmp_path, **where), 1, "is a private key")


def test_replicas_get_the_key_the_device_and_their_share_of_it(tmp_path: Path) -> None:
    generate(tmp_path / "registry.key", tmp_path / "registry.pub")
    where = {"MODEL_REGISTRY_PATH": str(MODELS), "GATEWAY_REGISTRY_KEY_FILE": "registry.pub"}
    words = ("deploy", "--dry-run", "--device", "cuda", "--size")
    (application,) = json.loads(sluice(*words, "medium", cwd=tmp_path, **where).stdout)["applications"]
    served = application["deployments"][0]["user_config"]
    assert served["registry_key_path"] == str(tmp_path / "registry.pub")
    assert (served["device"], served["gpu_share"]) == ("cuda", 0.5)
    assert_one_plain_line(sluice(*words, "local", cwd=tmp_path, **where), EX_CONFIG, "no GPU share")
