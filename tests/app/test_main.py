from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.backends.fake import FakeBackend
from app.main import create_app
from app.rollout.state import StateUnreadable
from app.settings import ConfigError, Settings
from tests.app.rollout.rollouts import set_share
from tests.app.under_test import MakeGateway, some_windows

_IMPORT = """
import sys, time
started = time.process_time()
import app.main
print(time.process_time() - started, *(m for m in ("ray", "torch", "redis", "jose.jwe", "sklearn") if m in sys.modules))
"""


def test_the_gateway_imports_quickly_and_without_ray_or_torch() -> None:
    words = subprocess.run(
        [sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    ).stdout.split()
    assert words[1:] == []
    assert float(words[0]) < 1.5  # CPU seconds; about 0.7 on a quiet machine


def test_settings_that_leave_nothing_to_answer_are_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="nothing can answer"):
        create_app(settings.with_overrides(legacy="off"))


def test_no_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token secret"):
        create_app(Settings(_env_file=None, state_dir=tmp_path), backends=[FakeBackend()])


def test_the_default_arms_are_those_of_the_settings(settings: Settings) -> None:
    def arms(**overrides: str) -> list[str]:
        return [backend.name for backend in create_app(settings.with_overrides(**overrides)).state.gateway.backends]

    assert arms() == ["legacy"]
    assert arms(ray_address="head:6379") == ["ray_serve", "legacy"]
    assert arms(ray_address="auto", legacy="off") == ["ray_serve"]
    assert arms(ray_address="auto", legacy="remote", legacy_url="http://old:8000") == ["ray_serve", "legacy"]


@pytest.mark.parametrize("exact", [True, False])
def test_the_engine_and_the_exact_mode_reach_legacy(settings: Settings, exact: bool) -> None:
    (arm,) = create_app(settings.with_overrides(engine="auto", exact=exact)).state.gateway.backends
    legacy = arm._backend
    assert (legacy._source.engine, legacy._source.exact) == ("auto", exact)


def test_a_remote_legacy_where_clouds_keep_their_credentials_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="link-local"):
        create_app(settings.with_overrides(legacy="remote", legacy_url="http://169.254.169.254"))


def test_the_sticky_key_is_made_once_and_for_the_owner_alone(settings: Settings) -> None:
    create_app(settings, backends=[FakeBackend()])
    file = settings.state_dir / "sticky.key"
    key = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    create_app(settings, backends=[FakeBackend()])
    assert file.read_bytes() == key
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        create_app(settings, backends=[FakeBackend()])


def test_a_state_folder_that_cannot_be_used_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot keep state"):
        create_app(settings.with_overrides(state_dir=tmp_path / "file" / "state"), backends=[FakeBackend()])


async def test_backends_run_while_the_gateway_does(make_gateway: MakeGateway) -> None:
    backends = [FakeBackend("ray_serve"), FakeBackend("legacy")]
    async with make_gateway(backends=backends):
        assert all(backend.running for backend in backends)
    assert not any(backend.running for backend in backends)


async def test_a_backend_that_cannot_start_stops_the_others(make_gateway: MakeGateway) -> None:
    class Broken(FakeBackend):
        async def start(self) -> None:
            raise RuntimeError("broken")

    first = FakeBackend("ray_serve")
    with pytest.raises(RuntimeError, match="broken"):
        async with make_gateway(backends=[first, Broken("legacy")]):
            pass
    assert not first.running


async def test_nothing_is_left_running_after_the_gateway_stops(make_gateway: MakeGateway) -> None:
    before = asyncio.all_tasks()
    async with make_gateway() as gateway:
        await gateway.predict()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_the_share_outlives_a_restart(settings: Settings) -> None:
    async def served_by(share: float | None) -> str:
        app = create_app(settings, backends=[FakeBackend("ray_serve"), FakeBackend("legacy")])
        async with app.router.lifespan_context(app):
            if share is not None:
                await set_share(app.state.gateway.rollout, share)
            return str(app.state.gateway.rollout.record.share)

    assert await served_by(0.25) == "0.25"
    assert await served_by(None) == "0.25"


async def test_without_redis_a_new_worker_follows_what_the_old_one_is_still_told(settings: Settings) -> None:
    old, new = (create_app(settings, backends=[FakeBackend("ray_serve"), FakeBackend("legacy")]) for _ in range(2))
    async with old.router.lifespan_context(old), new.router.lifespan_context(new):
        await set_share(old.state.gateway.rollout, 0.25)
        async with asyncio.timeout(5):
            while new.state.gateway.rollout.record.share != 0.25:
                await asyncio.sleep(0.02)


async def test_a_broken_state_file_is_said_and_not_overwritten(settings: Settings) -> None:
    settings.state_dir.mkdir(mode=0o700)
    (settings.state_dir / "rollout.json").write_text("{")
    app = create_app(settings, backends=[FakeBackend()])
    with pytest.raises(StateUnreadable, match=r"rollout\.json"):
        async with app.router.lifespan_context(app):
            pass
    assert (settings.state_dir / "rollout.json").read_text() == "{"


async def test_two_gateways_in_one_process_do_not_meet(make_gateway: MakeGateway) -> None:
    async with make_gateway() as one, make_gateway() as other:
        await one.predict(some_windows(3))
        stats = [
            (await gateway.client.get("/stats", headers=gateway.bearer("ops"))).json()["predictions"]
            for gateway in (one, other)
        ]
    assert stats == [1, 0]


async def test_a_gateway_without_lifespan_still_refuses_in_form(settings: Settings) -> None:
    app = create_app(settings, backends=[FakeBackend()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        response = await client.post("/ray-serve/predict")
    assert response.status_code == 401
