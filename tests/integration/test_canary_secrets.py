"""Secrets of every kind put through everything, and then looked for in everything that is written or shown."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.local_ray import LocalRay, descendants
from serve_app.contract import N_FEATURES, N_STEPS
from serve_app.serve_config import ServedApplication, ServedModel
from tests.app.cli.command import sluice
from tests.integration.processes import ROOT, GatewayProcess, deploy
from tests.integration.redis_server import RedisServer
from tests.integration.test_local_ray import listening_addresses

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
PAYLOAD = 0.7182818  # a value that nothing else here would have
RAW = {"Content-Type": "application/octet-stream"}


class Canaries:
    """Values that must stay where they were put, by name."""

    def __init__(self, folder: Path) -> None:
        self.by_name: dict[str, str] = {"payload": str(PAYLOAD)}
        self.files: set[Path] = set()
        self._folder = folder

    def value(self, name: str) -> str:
        return self.by_name.setdefault(name, secrets.token_urlsafe(48))

    def file(self, name: str) -> str:
        path = self._folder / f"{name}.secret"
        path.touch(mode=0o600)
        path.write_text(self.value(name))
        self.files.add(path)
        return str(path)

    def found_in(self, text: bytes) -> set[str]:
        """Names of those of which even a part can be read."""
        return {name for name, value in self.by_name.items() if value[:24].encode() in text or value.encode() in text}


@pytest.fixture
def canaries(tmp_path: Path) -> Canaries:
    return Canaries(tmp_path)


def ask_everything(gateway: GatewayProcess, canaries: Canaries) -> Iterator[httpx.Response]:
    """Good requests and bad ones, with secrets where they belong and where they do not."""
    token = gateway.headers()["Authorization"].removeprefix("Bearer ")
    canaries.by_name |= {"token": token.rpartition(".")[2], "claims": token.split(".")[1]}
    key = canaries.by_name["api_key"]
    window = np.full((N_FEATURES, N_STEPS), PAYLOAD, dtype="<f4")
    wrong = '{"data": [[' + f"{PAYLOAD}," * 60 + '"x"]], "return_uncertainty": true}'
    with httpx.Client(base_url=gateway.url, timeout=10.0, trust_env=False) as http:
        for credential in (
            token,
            key,
            f"{token}x",
            f"{key[:-1]}x",
            key.replace("gk_", ""),
            canaries.value("jwt_secret"),
        ):
            bearer = {"Authorization": f"Bearer {credential}"}
            yield http.post("/ray-serve/predict", content=window.tobytes(), headers={**bearer, **RAW})
            yield http.post("/ray-serve/predict", json={"data": window.astype(float).tolist()}, headers=bearer)
            yield http.post("/ray-serve/predict", content=wrong, headers={**bearer, "Content-Type": "application/json"})
            yield http.post("/v2/models/cnn_lstm/infer", content=window.tobytes()[:-1], headers={**bearer, **RAW})
            yield http.put("/rollout", json={"ray_serve_fraction": PAYLOAD, credential: 1}, headers=bearer)
            for path in ("/stats", "/ray-serve/stats", "/metrics", "/rollout", "/v2", "/health", "/v2/models/stats"):
                yield http.get(path, headers=bearer)
            named = credential[:60] if credential.startswith(("gk_", "eyJ")) else "order-17"
            for odd in ({"X-Request-Id": named}, {"X-Route-Key": credential}, {"X-Route-To": credential}):
                yield http.post("/ray-serve/predict", content=window.tobytes(), headers={**bearer, **RAW, **odd})
            yield http.get(
                f"/{credential}?access_token={credential}&token={credential}", headers={"Cookie": credential}
            )
            yield http.get(f"/v2/models/{credential}/versions/{credential}", headers={**bearer, "Referer": credential})


def fail_at_the_command_line(canaries: Canaries, folder: Path) -> Iterator[bytes]:
    """What operators see when a start fails, or a command does."""
    weak = canaries.value("weak_secret")[:20]
    canaries.by_name["weak_secret"] = weak
    jwt, redis_password = canaries.value("jwt_secret"), canaries.value("redis_password")
    faulty: list[dict[str, str]] = [
        {"GATEWAY_JWT_SECRET": weak},
        {"GATEWAY_JWT_SECRET": jwt, "GATEWAY_STICKY_KEY": canaries.value("sticky_key") * 2},
        {"GATEWAY_JWT_SECRET": jwt, "GATEWAY_PORT": "x"},
        {"GATEWAY_JWT_SECRET": jwt, "GATEWAY_JWT_SECRT": weak},
        {"GATEWAY_JWT_SECRET": jwt, "REDIS_URL": f"redis://ann:{redis_password}@host:port/0"},
        {"GATEWAY_JWT_SECRET": jwt, "REDIS_URL": f"http://:{redis_password}@host"},
        {
            "GATEWAY_JWT_SECRET": jwt,
            "GATEWAY_LEGACY": "remote",
            "GATEWAY_LEGACY_URL": f"http://ann:{canaries.value('legacy_token')}@host",
        },
    ]
    with ThreadPoolExecutor(2) as starts:
        results = list(
            starts.map(lambda environment: sluice("serve", "--port", "0", cwd=folder, **environment), faulty)
        )
    for environment, result in zip(faulty, results, strict=True):
        assert result.returncode == 78, (environment.keys(), result)
        yield (result.stdout + result.stderr).encode()
    for words in (("token", "--sub", "\x00", "--scope", "predict"), ("key", "revoke", canaries.by_name["api_key"])):
        with contextlib.suppress(ValueError):  # no process has a zero byte in its arguments
            result = sluice(*words, cwd=folder, GATEWAY_JWT_SECRET=jwt)
            yield (result.stdout + result.stderr).encode()


def shown_by_processes() -> Iterator[tuple[str, bytes]]:
    """Arguments and environment of every process that we may look at."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                yield f"{process}/{name}", (process / name).read_bytes()


def written_below(folder: Path, but: set[Path]) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and path not in but:
            with contextlib.suppress(OSError):
                yield str(path), path.read_bytes()


@pytest.fixture
def ray_cluster() -> Iterator[LocalRay]:
    """A Ray of its own: what other tests deploy on theirs may listen elsewhere."""
    with LocalRay(num_cpus=4) as cluster:
        yield cluster


def test_no_secret_is_found_where_it_was_not_put(ray_cluster: LocalRay, tmp_path: Path, canaries: Canaries) -> None:
    canaries.by_name["ray_token"] = ray_cluster.token_file.read_text()
    made = sluice("key", "create", "--sub", "desk", "--scope", "predict ops", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    canaries.by_name["api_key"] = made.stdout.strip()
    state = tmp_path / ".run" / "state"
    canaries.by_name["pepper"] = (state / "api_keys.pepper").read_text().strip()
    deploy(ray_cluster, ServedApplication(serves=ServedModel(registry_path=str(ROOT / "models"), engine="noop")))
    redis_folder = tmp_path / "redis"
    redis_folder.mkdir()
    with RedisServer(redis_folder, password=canaries.value("redis_password")) as redis:
        gateway = GatewayProcess(
            tmp_path,
            {
                **ray_cluster.environment,
                "RAY_ADDRESS": ray_cluster.address,
                "REDIS_URL": redis.url.replace("redis://", f"redis://:{canaries.value('redis_password')}@"),
                "GATEWAY_STICKY_KEY": canaries.value("sticky_key"),
                "GATEWAY_LEGACY": "remote",
                "GATEWAY_LEGACY_URL": ray_cluster.dashboard_url,  # it answers, and never as legacy does
                "GATEWAY_LEGACY_TOKEN_FILE": canaries.file("legacy_token"),
                "GATEWAY_LOG_LEVEL": "debug",
            },
            secret=canaries.value("jwt_secret"),
        )
        try:
            gateway.wait_for("ray_serve")
            answers = list(ask_everything(gateway, canaries))
            redis.kill()
            answers += ask_everything(gateway, canaries)
            shown = list(shown_by_processes())
            family = {gateway.pid, *descendants(gateway.pid), ray_cluster.pid, *descendants(ray_cluster.pid)}
            assert listening_addresses(family) <= LOOPBACK
        finally:
            gateway.stop()
    assert {200, 401, 403, 404, 422} <= {answer.status_code for answer in answers}
    for answer in answers:
        told = answer.content + str(answer.headers.multi_items()).encode()
        assert not canaries.found_in(told) - {"payload"}, (answer.status_code, answer.request.url.path[:30])
    for output in fail_at_the_command_line(canaries, tmp_path):
        assert output
        assert canaries.found_in(output) == set(), output
    secret_files = {*canaries.files, state / "api_keys.pepper", ray_cluster.token_file}
    written = [*written_below(tmp_path, secret_files), *written_below(ray_cluster.directory, secret_files)]
    assert len(written) > 10
    assert gateway.log.read_bytes().count(b'"event":"request"') >= len(answers)
    for place, text in [*shown, *written]:
        found = canaries.found_in(text) - ({"payload"} if place.endswith("rollout.json") else set())
        assert found == set(), place
