from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console

from app.auth import ApiKeyFile, Principal, make_key
from app.doctor import Finding, examine, examine_installation, render, settings_refused
from app.settings import ConfigError, Settings
from tests.app.auth.signing import ec_key, public_jwk
from tests.integration.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
SECRET = "pR8-vQ2mZxT5nK0bLw7yHdJ4sGfA9cUeE1iN6oXr3tVq"


@pytest.fixture(autouse=True)
def bare_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.touch(mode=0o600)
    file.write_text(SECRET)
    return file


def settings(secret_file: Path, **values: Any) -> Settings:
    return Settings.model_validate(
        {"registry_path": ROOT / "models", "port": 0, "jwt_secret_file": secret_file, **values}
    )


def found(check: str, settings: Settings, **clocks: Any) -> Finding:
    (finding,) = [finding for finding in examine(settings, **clocks) if finding.check == check]
    return finding


@pytest.fixture
def answering() -> Iterator[tuple[int, dict[str, tuple[int, object]]]]:
    """A port of loopback that answers GET with what the dictionary says."""
    answers: dict[str, tuple[int, object]] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            guarded = "guarded" in answers and "Authorization" not in self.headers
            status, document = (401, {}) if guarded else answers.get(self.path, (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, answers
        server.shutdown()
        thread.join()


def test_a_sound_installation_has_nothing_to_mend(secret_file: Path) -> None:
    findings = [*examine_installation(), *examine(settings(secret_file))]
    assert {(finding.check, finding.level) for finding in findings} == {
        (check, "ok")
        for check in (
            *("python", "packages", "port", "registry", "token secret", "API keys"),
            *("state folder", ".env", "legacy", "ray", "redis", "clock"),
        )
    }
    assert not any(finding.advice for finding in findings)


def test_every_trouble_comes_with_advice_and_is_shown(secret_file: Path, tmp_path: Path) -> None:
    ill = settings(secret_file, registry_path=tmp_path / "nowhere", legacy="off")
    troubles = [finding for finding in examine(ill) if finding.level != "ok"]
    assert {finding.check for finding in troubles} == {"registry", "ray"}
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(troubles))
    console.file.close()
    shown = console.export_text()
    assert all(finding.advice and finding.advice in shown for finding in troubles)


def test_text_in_brackets_is_shown_and_not_taken_for_markup() -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render([Finding("check", "warn", "of [red]type[/]", "")]))
    console.file.close()
    assert "of [red]type[/]" in console.export_text()


def test_a_taken_port_fails_unless_sluice_has_it(
    secret_file: Path, answering: tuple[int, dict[str, tuple[int, object]]]
) -> None:
    port, answers = answering
    assert found("port", settings(secret_file, port=port)).level == "fail"
    answers["/health/live"] = (200, {"status": "live"})
    assert found("port", settings(secret_file, port=port)).level == "ok"


def test_a_registry_with_an_altered_file_fails(secret_file: Path, tmp_path: Path) -> None:
    version = tmp_path / "models" / "cnn_lstm" / "1"
    version.mkdir(parents=True)
    for file in (ROOT / "models" / "cnn_lstm" / "1").iterdir():
        (version / file.name).write_bytes(file.read_bytes())
    here = settings(secret_file, registry_path=tmp_path / "models")
    assert found("registry", here).level == "ok"
    (version / "CARD.md").write_text("better than it is")
    assert found("registry", here).level == "fail"


def test_an_unsigned_version_fails_where_signatures_are_asked_for(secret_file: Path, tmp_path: Path) -> None:
    key = tmp_path / "public.pem"
    key.write_bytes(
        Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    assert "sign" in found("registry", settings(secret_file, registry_key_file=key)).found
    key.write_text("no key")
    assert found("registry", settings(secret_file, registry_key_file=key)).level == "fail"


def test_a_remote_legacy_that_nobody_answers_for_fails(
    secret_file: Path, answering: tuple[int, dict[str, tuple[int, object]]]
) -> None:
    there = settings(secret_file, legacy="remote", legacy_url=f"http://127.0.0.1:{answering[0]}")
    assert found("legacy", there).level == "ok"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert found("legacy", there.with_overrides(legacy_url=url)).level == "fail"
    for stub in ("noop", "sleep"):
        assert found("legacy", settings(secret_file, engine=stub)).level == "warn"


def test_an_engine_whose_extra_is_missing_fails(secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("legacy", settings(secret_file, engine="openvino")).level == "ok"
    monkeypatch.setattr("serve_app.extras.find_spec", lambda library: None)
    finding = found("legacy", settings(secret_file, engine="openvino"))
    assert finding.level == "fail"
    assert "pip install 'sluice[openvino]'" in finding.found


def test_a_secret_is_never_shown_and_better_kept_in_a_file(secret_file: Path) -> None:
    from_environment = settings(secret_file, jwt_secret_file=None, jwt_secret=SECRET)
    findings = examine(from_environment)
    assert SECRET not in repr(findings)
    assert found("token secret", from_environment).level == "warn"
    assert found("token secret", settings(secret_file, jwt_secret_file=None)).level == "fail"
    opened = settings(secret_file)
    secret_file.chmod(0o644)
    assert "chmod 600" in found("token secret", opened).found


def test_the_issuer_s_keys_are_read_from_the_file_or_asked_of_the_url(
    secret_file: Path, tmp_path: Path, answering: tuple[int, dict[str, tuple[int, object]]]
) -> None:
    port, answers = answering
    by_keys = {"jwt_secret_file": None, "state_dir": tmp_path / "state"}
    rows = {"keys": [public_jwk(ec_key(), "k1")]}
    by_url = settings(secret_file, **by_keys, jwt_jwks_url=f"http://127.0.0.1:{port}/keys")
    assert found("token keys", by_url).level == "fail"
    answers["/keys"] = 200, rows
    assert found("token keys", by_url).found.startswith("1 from")
    file = tmp_path / "jwks.json"
    by_file = settings(secret_file, **by_keys, jwt_jwks_file=file)
    assert found("token keys", by_file).level == "fail"
    file.write_text(json.dumps(rows))
    file.chmod(0o644)
    assert found("token keys", by_file).level == "ok"


def test_a_damaged_table_of_api_keys_fails(secret_file: Path, tmp_path: Path) -> None:
    with_keys = settings(secret_file, state_dir=tmp_path)
    table, pepper = with_keys.api_key_paths()
    credential = ApiKeyFile(table, pepper).add(lambda pepper: make_key(Principal("a"), pepper, now=0, lifetime_s=None))
    assert found("API keys", with_keys).found.startswith("1 in")
    assert credential[12:] not in repr(examine(with_keys))
    table.chmod(0o644)
    assert "chmod 600" in found("API keys", with_keys).found
    table.chmod(0o600)
    pepper.unlink()
    assert found("API keys", with_keys).level == "fail"


def test_settings_that_cannot_be_read_are_a_finding() -> None:
    finding = settings_refused(ConfigError("GATEWAY_PORT: must be a number"))
    assert (finding.level, finding.found) == ("fail", "GATEWAY_PORT: must be a number")


@pytest.mark.parametrize(("mode", "level"), [(0o700, "ok"), (0o750, "ok"), (0o770, "fail"), (0o702, "fail")])
def test_a_state_folder_that_others_can_write_to_fails(
    secret_file: Path, tmp_path: Path, mode: int, level: str
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    assert found("state folder", settings(secret_file, state_dir=folder)).level == level


def test_a_sticky_key_that_others_can_open_fails(secret_file: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    key = tmp_path / "state" / "sticky.key"
    key.write_text("key")
    key.chmod(0o644)
    assert found("state folder", settings(secret_file, state_dir=tmp_path / "state")).level == "fail"


def test_a_dotenv_with_a_secret_is_closed(secret_file: Path, tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("GATEWAY_PORT=8000\nGATEWAY_JWT_SECRET=\n")
    dotenv.chmod(0o644)
    assert found(".env", settings(secret_file)).level == "ok"
    dotenv.write_text("GATEWAY_JWT_SECRET=something\n")
    assert found(".env", settings(secret_file)).level == "warn"
    dotenv.chmod(0o600)
    assert found(".env", settings(secret_file)).level == "ok"


def test_a_cluster_that_is_away_fails_quickly(secret_file: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        away = settings(
            secret_file, ray_address=f"127.0.0.1:{nobody.getsockname()[1]}", ray_dashboard_url="http://0.0.0.0:1"
        )
        levels = {finding.check: finding.level for finding in examine(away)}
    assert (levels["ray"], levels["deployment"], levels["ray token"]) == ("fail", "fail", "warn")


def test_a_dashboard_open_to_everybody_is_a_warning(
    secret_file: Path, tmp_path: Path, answering: tuple[int, dict[str, tuple[int, object]]]
) -> None:
    port, answers = answering
    answers["/api/serve/applications/"] = (200, {"applications": {"cnn_lstm_predictor": {"status": "RUNNING"}}})
    token = token_file(tmp_path)
    here = settings(
        secret_file, ray_address="auto", ray_dashboard_url=f"http://127.0.0.1:{port}", ray_auth_token_path=token
    )
    assert found("deployment", here).level == "ok"
    assert found("ray token", here).level == "warn"
    answers["guarded"] = (200, {})
    assert found("deployment", here).level == "ok"
    assert found("ray token", here).level == "ok"
    assert found("deployment", here.with_overrides(ray_auth_token_path=None)).level == "fail"
    answers["/api/serve/applications/"] = (200, {"applications": {}})
    assert "sluice deploy" in found("deployment", here).advice


def test_a_version_that_serve_takes_for_served_and_replicas_refuse_is_told(
    secret_file: Path, tmp_path: Path, answering: tuple[int, dict[str, tuple[int, object]]]
) -> None:
    port, answers = answering
    here = settings(
        secret_file,
        ray_address="auto",
        ray_dashboard_url=f"http://127.0.0.1:{port}",
        ray_auth_token_path=token_file(tmp_path),
    )
    for version, level in (("1", "ok"), ("9", "fail")):
        serves = {"registry_path": str(ROOT / "models"), "model": "cnn_lstm", "version": version, "engine": "torch"}
        deployments = {"CNNLSTMPredictor": {"deployment_config": {"user_config": serves}}}
        application = {"status": "RUNNING", "deployments": deployments}
        answers["/api/serve/applications/"] = (200, {"applications": {"cnn_lstm_predictor": application}})
        finding = found("deployment", here)
        assert finding.level == level
        assert (version in finding.found) is (level == "fail")


def token_file(folder: Path) -> Path:
    token = folder / "ray_token"
    token.touch(mode=0o600)
    token.write_text("a" * 64)
    return token


def test_a_clock_that_is_wrong_or_set_meanwhile_fails(secret_file: Path) -> None:
    here = settings(secret_file)
    assert found("clock", here, wall_clock=lambda: 1_000_000_000.0, clock=lambda: 0.0).level == "fail"
    steps = iter([1e9, *[2e9] * 20])
    assert "was set" in found("clock", here, wall_clock=lambda: next(steps), clock=lambda: 0.0).found


def test_a_package_that_is_not_the_pinned_one_fails() -> None:
    finding = examine_installation(["numpy==0.0.1", "nothing==1", "ray[serve]==2.60.0", 'x==1; extra == "y"'])[1]
    assert finding.level == "fail"
    assert finding.found.endswith("not 0.0.1; nothing missing, not 1")


def test_a_redis_that_takes_no_writes_is_told_and_its_password_is_not(secret_file: Path, tmp_path: Path) -> None:
    def look(url: str, **others: object) -> Finding:
        findings = examine(settings(secret_file, redis_url=url, **others))
        return next(finding for finding in findings if finding.check == "redis")

    with RedisServer(tmp_path, "canary-6f0d") as redis:
        assert (found := look(redis.url)).level == "fail"
        assert "AuthenticationError" in found.found
        in_the_url = look(redis.url.replace("://", "://:canary-6f0d@"))
        assert in_the_url.level == "warn"
        (password := tmp_path / "password").write_text("canary-6f0d\n")
        password.chmod(0o600)
        assert look(redis.url, redis_password_file=password).level == "ok"
    away = look(redis.url)
    assert away.level == "fail"
    assert "canary" not in repr((found, in_the_url, away))
