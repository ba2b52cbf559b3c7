"""What counts as answered, over real sockets against a server that can misbehave."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from app.bench.load import OK, NoTarget, Outcome
from app.bench.targets import CONNECTION, TIMEOUT, UNREADABLE, HandleTarget, HttpTarget
from tests.app.bench.scripted_server import Answer, answer, prediction, serving

WINDOWS = np.arange(2 * 50 * 60, dtype=np.float32).reshape(2, 50, 60)


async def outcome_of(told: Answer) -> Outcome:
    async with serving(lambda n: told) as server:
        target = HttpTarget(server.url, "t", [WINDOWS[:1]])
        outcome = await target.ask(0)
        await target.close()
    return outcome


async def test_an_answer_counts_with_who_gave_it() -> None:
    assert await outcome_of(prediction()) == Outcome(OK, "ray_serve")


@pytest.mark.parametrize(
    ("told", "code"),
    [
        (answer(503, {}), "503"),
        (answer(429, {}), "429"),
        (answer(200, {"predictions": None}), UNREADABLE),
        (prediction(n_windows=2), UNREADABLE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{{{", UNREADABLE),
        (b"", CONNECTION),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nConnection: close\r\n\r\n{", CONNECTION),
        (b"SSH-2.0-OpenSSH\r\n", CONNECTION),
    ],
)
async def test_whatever_else_comes_is_a_failure_with_its_kind(told: bytes, code: str) -> None:
    assert (await outcome_of(told)).code == code


async def test_silence_is_a_timeout_and_its_late_answer_is_nobody_elses() -> None:
    def script(n: int) -> Answer:
        if n == 0:
            return None
        late = answer(503, {}) if server.connections == 1 else b""  # it would come on the connection of its request
        return late + prediction()

    async with serving(script) as server:
        target = HttpTarget(server.url, "t", [WINDOWS[:1]], timeout_s=0.2)
        assert (await target.ask(0)).code == TIMEOUT
        assert (await target.ask(1)).code == OK
        await target.close()


async def test_one_connection_is_kept_and_a_closed_one_replaced() -> None:
    async with serving(lambda n: prediction(headers="Connection: close\r\n" if n == 4 else "")) as server:
        target = HttpTarget(server.url, "t", [WINDOWS[:1]])
        for number in range(8):
            assert (await target.ask(number)).code == OK
        await target.close()
        assert server.connections == 2


@pytest.mark.parametrize("body", ["binary", "json"])
async def test_the_windows_travel_whole(body: str) -> None:
    async with serving(lambda n: prediction(n_windows=2)) as server:
        target = HttpTarget(f"{server.url}/base/", "secret", [WINDOWS], body=body)
        assert (await target.ask(0)).code == OK
        await target.close()
        ((head, sent),) = server.requests
    assert head.startswith(b"POST /base/ray-serve/predict HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in head
    received = np.frombuffer(sent, "<f4") if body == "binary" else np.array(json.loads(sent)["data"])
    np.testing.assert_array_equal(received.reshape(2, 50, 60), WINDOWS)


async def test_a_refused_token_ends_the_test_before_it_begins() -> None:
    problem = {"title": "Unauthorized", "detail": "the token has expired"}
    async with serving(lambda n: answer(401, problem)) as server:
        with pytest.raises(NoTarget, match="401 Unauthorized: the token has expired"):
            await HttpTarget(server.url, "t", [WINDOWS]).open()


async def test_a_busy_service_is_measured_nonetheless() -> None:
    async with serving(lambda n: answer(503, {})) as server:
        target = HttpTarget(server.url, "t", [WINDOWS])
        await target.open()
        await target.close()


async def test_nobody_there_is_one_plain_line() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(NoTarget, match=f"no answer from {url}"):
            await HttpTarget(url, "t", [WINDOWS]).open()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(NoTarget, match="ray://"):
        HttpTarget("ray://head:10001", "t", [WINDOWS])


def test_more_windows_than_a_handle_call_carries_are_refused() -> None:
    with pytest.raises(NoTarget, match="32"):
        HandleTarget("127.0.0.1:6379", [np.zeros((33, 50, 60), np.float32)], concurrency=1)


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:65536", "ftp://127.0.0.1", "127.0.0.1:8000"])
def test_what_is_no_address_is_said_plainly(url: str) -> None:
    with pytest.raises(NoTarget, match="is no "):
        HttpTarget(url, "token", [np.zeros((1, 50, 60), np.float32)])
