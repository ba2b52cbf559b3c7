"""A gateway with its real middleware, in this process, over fake backends and a wall clock moved by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from app.auth import mint_token
from app.backends.base import Call
from app.backends.fake import FakeBackend
from app.settings import Settings
from serve_app.contract import N_FEATURES, N_STEPS

NOW = 1_800_000_000.0


class FakeClock:
    """Seconds that pass when they are told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class GatewayUnderTest:
    """The application in production form, and the strings that a test pulls."""

    app: FastAPI
    client: httpx.AsyncClient
    ray_serve: FakeBackend
    legacy: FakeBackend
    wall_clock: FakeClock
    settings: Settings
    log: io.BytesIO

    def token(self, scopes: str = "predict", subject: str = "desk-7", tenant: str | None = None) -> str:
        return mint_token(
            self.settings.signing_secret(),
            subject=subject,
            scopes=scopes.split(),
            issuer=self.settings.jwt_issuer,
            audience=self.settings.jwt_audience,
            lifetime_s=3600,
            now=self.wall_clock(),
            tenant=tenant,
        )

    def bearer(self, scopes: str = "predict", subject: str = "desk-7", tenant: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(scopes, subject, tenant)}"}

    def calls(self) -> list[Call]:
        """The calls that reached a model on behalf of a client."""
        return client_calls(self.ray_serve) + client_calls(self.legacy)

    async def predict(
        self,
        windows: np.ndarray | None = None,
        *,
        body: bytes | None = None,
        scopes: str = "predict",
        subject: str = "desk-7",
        headers: dict[str, str] | None = None,
        query: str = "",
    ) -> httpx.Response:
        """One prediction with a raw float32 body."""
        return await self.client.post(
            "/ray-serve/predict" + query,
            content=some_windows(1).tobytes() if windows is None and body is None else body or windows.tobytes(),
            headers={
                "Content-Type": "application/octet-stream",
                **self.bearer(scopes, subject),
                **(headers or {}),
            },
        )

    async def predict_json(self, document: Any, **headers: str) -> httpx.Response:
        """One prediction with a JSON body; a `str` or `bytes` document is sent as it is."""
        body = document if isinstance(document, str | bytes) else json.dumps(document)
        return await self.client.post(
            "/ray-serve/predict", content=body, headers={"Content-Type": "application/json", **self.bearer(), **headers}
        )

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def client_calls(backend: FakeBackend) -> list[Call]:
    """The calls that requests made; the health probe's own inferences are none of them."""
    return [call for call in backend.calls if len(call.request_id) == 32]


def some_windows(n_windows: int, seed: int = 0) -> np.ndarray:
    """float32[B, F, T] of plausible features."""
    return np.random.default_rng(seed).standard_normal((n_windows, N_FEATURES, N_STEPS)).astype("<f4")


MakeGateway = Callable[..., AbstractAsyncContextManager[GatewayUnderTest]]
