"""`sluice serve` as a process: what it refuses to start with."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from app.cli.serve import _require_parts
from app.settings import ConfigError, Settings
from serve_app.signing import generate
from tests.app.cli.command import EX_CONFIG, MODELS, SECRET, assert_one_plain_line, sluice


def test_a_taken_port_is_one_line_that_names_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = sluice("serve", "--port", str(port), cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    assert_one_plain_line(result, EX_CONFIG, str(port), f"PORT={port + 1}")


def test_a_missing_model_is_one_line_that_names_the_registry(tmp_path: Path) -> None:
    result = sluice("serve", "--port", "0", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    assert_one_plain_line(result, EX_CONFIG, "no model", "models")


def test_an_engine_whose_extra_is_missing_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    environment = {"PYTHONPATH": str(tmp_path), "MODEL_REGISTRY_PATH": str(MODELS), "GATEWAY_ENGINE": "openvino"}
    result = sluice("serve", "--port", "0", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET, **environment)
    assert_one_plain_line(result, EX_CONFIG, "GATEWAY_ENGINE=openvino", "pip install 'sluice[openvino]'")


def test_a_damaged_state_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    state = tmp_path / ".run" / "state"
    state.mkdir(parents=True)
    (state / "rollout.json").write_text("{")
    environment = {"GATEWAY_JWT_SECRET": SECRET, "MODEL_REGISTRY_PATH": str(MODELS)}
    assert_one_plain_line(sluice("serve", "--port", "0", cwd=tmp_path, **environment), EX_CONFIG, "rollout.json")


def test_a_damaged_file_of_kills_is_one_line_that_names_it(tmp_path: Path) -> None:
    state = tmp_path / ".run" / "state"
    state.mkdir(parents=True)
    (state / "kill.json").write_text("{")
    environment = {"GATEWAY_JWT_SECRET": SECRET, "MODEL_REGISTRY_PATH": str(MODELS)}
    result = sluice("serve", "--port", "0", cwd=tmp_path, **environment)
    assert_one_plain_line(result, EX_CONFIG, "kill.json", "delete it if nothing is")


def test_a_weak_secret_is_refused_and_not_printed(tmp_path: Path) -> None:
    result = sluice("serve", cwd=tmp_path, GATEWAY_JWT_SECRET="hunter2hunter2")
    assert_one_plain_line(result, EX_CONFIG, "32 bytes")
    assert "hunter2" not in result.stderr


def test_an_unsigned_model_is_not_served_where_a_key_is_set(tmp_path: Path) -> None:
    generate(tmp_path / "registry.key", tmp_path / "registry.pub")
    where = {"MODEL_REGISTRY_PATH": str(MODELS), "GATEWAY_REGISTRY_KEY_FILE": "registry.pub"}
    serving = sluice("serve", "--port", "0", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET, **where)
    assert_one_plain_line(serving, EX_CONFIG, "is not signed")
    where["GATEWAY_REGISTRY_KEY_FILE"] = "registry.key"
    assert_one_plain_line(sluice("registry", "verify", cwd=tmp_path, **where), 1, "is a private key")


def sticky_key(folder: Path, content: bytes, mode: int = 0o600) -> dict[str, str]:
    state = folder / ".run" / "state"
    state.mkdir(parents=True)
    (state / "sticky.key").write_bytes(content)
    (state / "sticky.key").chmod(mode)
    return {}


REMOTE = {"GATEWAY_LEGACY": "remote", "GATEWAY_LEGACY_URL": "https://old.example"}
UNBUILDABLE: dict[str, tuple[Callable[[Path], dict[str, str]], str]] = {
    "nothing that answers": (lambda _: {"GATEWAY_LEGACY": "off"}, "nothing can answer: set RAY_ADDRESS"),
    "an address where clouds keep credentials": (
        lambda _: {**REMOTE, "GATEWAY_LEGACY_URL": "http://169.254.169.254"},
        "link-local",
    ),
    "certificates that are not there": (
        lambda folder: {**REMOTE, "GATEWAY_LEGACY_CA_FILE": str(folder / "nowhere.pem")},
        "nowhere.pem cannot be read",
    ),
    "a URL as cluster": (lambda _: {"RAY_ADDRESS": "http://head:6379"}, "RAY_ADDRESS: the Ray address must be"),
    "a sticky key open to others": (lambda folder: sticky_key(folder, b"k" * 32, 0o644), "sticky.key"),
    "a short sticky key": (lambda folder: sticky_key(folder, b"k" * 8), "sticky.key must have"),
}


@pytest.mark.parametrize("fault", UNBUILDABLE)
def test_what_workers_could_not_be_built_from_is_one_line_before_there_are_any(fault: str, tmp_path: Path) -> None:
    make, said = UNBUILDABLE[fault]
    environment = {"GATEWAY_JWT_SECRET": SECRET, "MODEL_REGISTRY_PATH": str(MODELS), **make(tmp_path)}
    assert_one_plain_line(sluice("serve", "--port", "0", cwd=tmp_path, **environment), EX_CONFIG, said)


def test_a_ray_of_its_own_is_one_that_answers(settings: Settings) -> None:
    _require_parts(settings.with_overrides(legacy="off"), joins_own_ray=True)
    with pytest.raises(ConfigError):
        _require_parts(settings.with_overrides(legacy="off"), joins_own_ray=False)
