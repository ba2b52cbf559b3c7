"""Fixtures: a gateway in production form, started and stopped around each test."""

from __future__ import annotations

import io
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.backends.fake import FakeBackend
from app.main import create_app
from app.rollout.state import MemoryStore
from app.settings import Settings
from tests.app.under_test import NOW, FakeClock, GatewayUnderTest, MakeGateway


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, jwt_secret=secrets.token_urlsafe(48), state_dir=tmp_path / "state")


@pytest.fixture
def make_gateway(settings: Settings) -> MakeGateway:
    """A gateway with some settings replaced, started and stopped around the block."""

    @asynccontextmanager
    async def make(backends: Sequence[FakeBackend] | None = None, **overrides: Any) -> AsyncIterator[GatewayUnderTest]:
        ray_serve, legacy = FakeBackend("ray_serve"), FakeBackend("legacy")
        wall_clock = FakeClock(NOW)
        log = io.BytesIO()
        changed = settings.with_overrides(**overrides)
        app = create_app(
            changed,
            backends=[ray_serve, legacy] if backends is None else backends,
            store=MemoryStore(),
            wall_clock=wall_clock,
            log_stream=log,
        )
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app)
            client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))
            yield GatewayUnderTest(app, client, ray_serve, legacy, wall_clock, changed, log)

    return make


@pytest.fixture
async def gateway(make_gateway: MakeGateway) -> AsyncIterator[GatewayUnderTest]:
    async with make_gateway() as gateway:
        yield gateway
