"""What the client says of an address at which no gateway answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from app.client import GatewayClient, GatewayRefused
from tests.app.test_over_sockets import listening
from tests.app.under_test import GatewayUnderTest, some_windows

ASKED: list[Callable[[GatewayClient], Any]] = [
    lambda gateway: gateway.predict(some_windows(1)),
    lambda gateway: gateway.ray_serve_stats(),
    lambda gateway: gateway.rollout(),
    lambda gateway: gateway.rollout_report(0.0),
    lambda gateway: gateway.set_fraction(0.5),
    lambda gateway: gateway.change_share({"share": 0.5}),
    lambda gateway: gateway.move_rollout("rollback", {}),
    lambda gateway: gateway.answering_arms(),
    lambda gateway: gateway.kills(),
    lambda gateway: gateway.change_kill({"scope": "symbol", "name": "MSFT", "reason": "halted"}),
]


def answering(response: Response) -> FastAPI:
    """Another service, which says the same to everybody."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
    async def answer(path: str) -> Response:
        return response

    return app


@pytest.mark.parametrize(
    "response",
    [
        HTMLResponse("<html>welcome</html>"),
        JSONResponse({"status": "ok"}),
        JSONResponse(["ok"]),
        JSONResponse(None),
        Response(b"\xff\xfe\x00"),
        RedirectResponse("/login"),
    ],
)
async def test_the_answer_of_another_service_is_told_in_one_line(response: Response) -> None:
    async with listening(answering(response)) as port:
        with GatewayClient(f"http://127.0.0.1:{port}", "token") as gateway:
            for ask in ASKED:
                with pytest.raises(GatewayRefused) as refused:
                    await asyncio.to_thread(ask, gateway)
                told = str(refused.value)
                assert told.startswith(f"http://127.0.0.1:{port}/")
                assert told.endswith(
                    f" answers {response.status_code}, and not as a gateway does: is it the right address?"
                )


async def test_a_gateway_is_known_by_all_that_it_answers(gateway: GatewayUnderTest) -> None:
    async with listening(gateway.app) as port:
        with GatewayClient(f"http://127.0.0.1:{port}", gateway.token("predict ops admin")) as client:
            for ask in ASKED:
                await asyncio.to_thread(ask, client)


@pytest.mark.parametrize("url", ["http://[::1", "http://\x00", "http://" + "a" * 64, "127.0.0.1:8000", ""])
def test_what_is_no_address_is_told_in_one_line(url: str) -> None:
    with pytest.raises(GatewayRefused) as refused, GatewayClient(url, "token") as gateway:
        gateway.rollout()
    assert "\n" not in str(refused.value)
