"""CPU that the gateway itself spends on a request: its whole application, with no server before it and no Ray behind.

Everything is on: token, limit, rollout, coalescing, ledger, metrics, access log. 32 callers ask for one window each,
in a closed loop; the model is a constant that comes two milliseconds after it was asked for. Reported is the process's
CPU time per request, the least of several rounds, which is the figure least disturbed by whatever else runs.

    python -m benchmarks.request_path [--requests 6400] [--rounds 5] [--profile float32] [--redis redis://127.0.0.1]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from fastapi import FastAPI

from app.auth import mint_token
from app.backends.base import Answer, BackendStatus, Call
from app.backends.coalesce import Coalescer, Group
from app.main import create_app
from app.settings import Settings
from serve_app.contract import N_FEATURES, N_STEPS, Prediction
from serve_app.engine import load_engine

CALLERS = 32
MODEL_S = 0.002


class ConstantBackend:
    """Stands where Ray Serve does: a coalescer before a constant."""

    name = "ray_serve"

    def __init__(self) -> None:
        self._engine = load_engine(None, engine="noop")
        self._coalescer = Coalescer(self._send, max_in_flight=4, max_queued_windows=1024)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self._coalescer.close()

    async def predict(self, call: Call) -> Answer:
        return await self._coalescer.predict(call)

    async def _send(self, group: Group) -> Prediction:
        await asyncio.sleep(MODEL_S)
        windows = np.concatenate([part.windows for part in group.parts])
        return self._engine.predict(windows, group.options)

    def is_ready(self, version: str | None = None) -> bool:
        return True

    def status(self) -> BackendStatus:
        return BackendStatus(True, versions=frozenset({"0"}))

    async def stats(self) -> dict[str, Any]:
        return {}


class Request:
    """One request as a server would hand it to the application."""

    def __init__(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        named = {**headers, "host": "127.0.0.1", "content-length": str(len(body))}
        self._headers = [(name.encode(), value.encode()) for name, value in named.items()]
        self._path = path
        self._body = body

    async def send_to(self, app: FastAPI) -> None:
        messages = [{"type": "http.request", "body": self._body, "more_body": False}]
        never: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        status = 0

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await never

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        await app(self._scope(), receive, send)
        if status != 200:
            raise SystemExit(f"{self._path}: answered {status}")

    def _scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": self._headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }


def main() -> None:
    arguments = parse()
    figures = uvloop.run(measure(arguments))
    print(json.dumps(figures, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU that the gateway itself spends on a request.")
    parser.add_argument("--requests", type=int, default=6400, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", choices=("float32", "json", "v2"), help="show where one protocol's time goes")
    parser.add_argument("--redis", help="URL of a Redis that counts for the limit; memory does without")
    return parser.parse_args()


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        settings = settings_in(folder, arguments.redis)
        app = create_app(settings, backends=[ConstantBackend()], log_stream=log)
        requests = requests_of(settings)
        async with app.router.lifespan_context(app):
            for request in requests.values():
                await ask(app, request, 640)
            if arguments.profile:
                await show_profile(lambda: ask(app, requests[arguments.profile], arguments.requests))
            rounds = [
                {name: await cpu_us(app, request, arguments.requests) for name, request in requests.items()}
                for _ in range(arguments.rounds)
            ]
    return {f"{name}_us": round(min(row[name] for row in rounds), 1) for name in requests}


def settings_in(folder: str, redis_url: str | None) -> Settings:
    return Settings.model_validate(
        {
            "jwt_secret": secrets.token_urlsafe(48),
            "state_dir": folder,
            "rate_limit": 10**9,
            "legacy": "off",
            "ray_address": "127.0.0.1:1",
            "redis_url": redis_url,
        }
    )


def requests_of(settings: Settings) -> dict[str, Request]:
    token = mint_token(
        settings.signing_secret(),
        subject="benchmark",
        scopes=["predict"],
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        lifetime_s=3600,
        now=time.time(),
    )
    window = np.random.default_rng(0).standard_normal((1, N_FEATURES, N_STEPS), dtype=np.float32)
    bearer = {"authorization": f"Bearer {token}"}
    as_json = json.dumps({"data": window.astype(float).tolist()}).encode()
    return {
        "float32": Request(
            "/ray-serve/predict", {**bearer, "content-type": "application/octet-stream"}, window.tobytes()
        ),
        "json": Request("/ray-serve/predict", {**bearer, "content-type": "application/json"}, as_json),
        "v2": Request(
            f"/v2/models/{settings.model}/infer",
            {**bearer, "content-type": "application/octet-stream", "inference-header-content-length": "0"},
            window.tobytes(),
        ),
    }


async def ask(app: FastAPI, request: Request, count: int) -> None:
    async def one_after_another() -> None:
        for _ in range(count // CALLERS):
            await request.send_to(app)

    await asyncio.gather(*(one_after_another() for _ in range(CALLERS)))


async def cpu_us(app: FastAPI, request: Request, count: int) -> float:
    started = time.process_time()
    await ask(app, request, count)
    return 1e6 * (time.process_time() - started) / count


async def show_profile(work: Callable[[], Any]) -> None:
    profile = cProfile.Profile()
    profile.enable()
    await work()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
