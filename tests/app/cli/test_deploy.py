"""`sluice deploy` as a process: what it would put onto a cluster, and what it refuses to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.cli.deploy import _ask_for_rejections, _standby
from app.client import GatewayRefused
from app.settings import Settings
from serve_app.serve_config import ServedModel
from serve_app.signing import generate
from tests.app.cli.command import EX_CONFIG, MODELS, SECRET, assert_one_plain_line, sluice


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


def test_the_engine_and_the_exact_mode_reach_the_replicas(tmp_path: Path) -> None:
    words = ("deploy", "--dry-run", "--engine")
    result = sluice(*words, "auto", "--exact", cwd=tmp_path, MODEL_REGISTRY_PATH=str(MODELS))
    (application,) = json.loads(result.stdout)["applications"]
    served = application["deployments"][0]["user_config"]
    assert (served["engine"], served["exact"]) == ("auto", True)
    result = sluice(*words, "magic", cwd=tmp_path, MODEL_REGISTRY_PATH=str(MODELS))
    assert_one_plain_line(result, EX_CONFIG, "openvino")


def test_replicas_get_the_key_the_device_and_their_share_of_it(tmp_path: Path) -> None:
    generate(tmp_path / "registry.key", tmp_path / "registry.pub")
    where = {"MODEL_REGISTRY_PATH": str(MODELS), "GATEWAY_REGISTRY_KEY_FILE": "registry.pub"}
    words = ("deploy", "--dry-run", "--device", "cuda", "--size")
    (application,) = json.loads(sluice(*words, "medium", cwd=tmp_path, **where).stdout)["applications"]
    served = application["deployments"][0]["user_config"]
    assert served["registry_key_path"] == str(tmp_path / "registry.pub")
    assert (served["device"], served["gpu_share"]) == ("cuda", 0.5)
    assert_one_plain_line(sluice(*words, "local", cwd=tmp_path, **where), EX_CONFIG, "no GPU share")


def test_an_engine_that_fails_on_purpose_is_deployed_with_its_file_and_never_in_production(tmp_path: Path) -> None:
    words = ("deploy", "--dry-run", "--engine", "faulty")
    where = {"MODEL_REGISTRY_PATH": str(MODELS)}
    assert_one_plain_line(sluice(*words, cwd=tmp_path, **where), EX_CONFIG, "needs GATEWAY_FAULT_FILE")
    result = sluice(*words, cwd=tmp_path, GATEWAY_FAULT_FILE="fault.json", **where)
    (application,) = json.loads(result.stdout)["applications"]
    assert application["deployments"][0]["user_config"]["fault_file"] == str(tmp_path / "fault.json")
    for engine in ("faulty", "noop", "sleep"):
        words = ("deploy", "--dry-run", "--engine", engine)
        assert_one_plain_line(sluice(*words, cwd=tmp_path, PROD="1", **where), EX_CONFIG, "PROD=1")


def test_a_registry_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = sluice("deploy", cwd=tmp_path, MODEL_REGISTRY_PATH=str(tmp_path / "gone"))
    assert_one_plain_line(result, EX_CONFIG, str(tmp_path / "gone"))


def test_a_version_that_replicas_would_refuse_is_refused_before_anything_is_put(tmp_path: Path) -> None:
    registry = tmp_path / "models"
    shutil.copytree(MODELS, registry)
    (registry / "cnn_lstm" / "1" / "model.safetensors").write_bytes(b"no model")
    result = sluice("deploy", "--version", "1", cwd=tmp_path, MODEL_REGISTRY_PATH=str(registry))
    assert_one_plain_line(result, EX_CONFIG, str(registry), "model.safetensors")


def running(**user_config: str | None) -> dict[str, Any]:
    return {"deployments": {"model": {"deployment_config": {"user_config": {"model": "cnn_lstm", **user_config}}}}}


def test_replicas_can_fall_back_to_the_last_good_version_that_was_deployed(tmp_path: Path) -> None:
    serves = ServedModel(registry_path=str(MODELS), version="2")
    assert _standby({}, serves) is None
    assert _standby(running(version="1"), serves) == "1"
    assert _standby(running(version="2", standby="1"), serves) == "1"
    assert _standby(running(version="9", standby="1"), serves) == "1"
    assert _standby(running(version="9"), serves) is None
    assert _standby(running(version="1") | {"deployments": {}}, serves) is None


def test_replicas_do_not_fall_back_to_a_version_that_the_key_refuses(tmp_path: Path) -> None:
    generate(tmp_path / "registry.key", tmp_path / "registry.pub")
    serves = ServedModel(registry_path=str(MODELS), version="2", registry_key_path=str(tmp_path / "registry.pub"))
    assert _standby(running(version="1"), serves) is None


class Gateway:
    """What a gateway tells of Ray Serve; it refuses to be asked where there is nothing to tell."""

    def __init__(self, rejected: list[dict[str, Any]] | None) -> None:
        self._rejected = rejected

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ray_serve_stats(self) -> dict[str, Any]:
        if self._rejected is None:
            raise GatewayRefused("no gateway answers")
        return {"rejected": self._rejected}


def told_of(
    rejected: list[dict[str, Any]] | None, monkeypatch: pytest.MonkeyPatch, *, jwt_secret: str | None = SECRET
) -> int:
    """The exit code of `_ask_for_rejections` for version 2, 0 where it says nothing against it."""
    monkeypatch.setattr("app.cli.deploy.gateway_client", lambda *_: Gateway(rejected))
    settings = Settings.model_construct(jwt_secret=jwt_secret, jwt_secret_file=None)
    try:
        _ask_for_rejections(settings, "2")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_version_that_replicas_refused_fails_the_deployment_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told_of([{"version": "2", "replicas": 3, "reason": "artefact-rejected"}], monkeypatch) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in ("3 replicas", "version 2", "artefact-rejected"))


@pytest.mark.parametrize("rejected", [[], [{"version": "1", "replicas": 3, "reason": "r"}], None])
def test_a_deployment_succeeds_where_no_replica_is_known_to_have_refused_it(
    rejected: list[dict[str, Any]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told_of(rejected, monkeypatch) == 0


def test_without_a_secret_it_is_said_that_the_gateway_was_not_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = [{"version": "2", "replicas": 3, "reason": "r"}]
    assert told_of(refused, monkeypatch, jwt_secret=None) == 0
    assert "was not asked" in capsys.readouterr().err
