"""An unchanged Triton client, synchronous and asynchronous, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from app.backends.fake import fake_prediction
from serve_app.contract import ModelFailed, NotReady, Options
from tests.app.test_over_sockets import listening
from tests.app.under_test import GatewayUnderTest, some_windows

MODEL = "cnn_lstm"
DEFAULT = ["classification_probs", "regression_pred", "regression_uncertainty", "aleatoric"]
EXTRA = ["epistemic", "ensemble_weights", "features"]


@pytest.fixture
async def port(gateway: GatewayUnderTest) -> AsyncIterator[int]:
    async with listening(gateway.app) as port:
        yield port


async def on_a_thread(port: int, work: Callable[[triton.InferenceServerClient], Any]) -> Any:
    """Run `work` with a synchronous client; its gevent hub belongs to the thread that made it."""

    def run() -> Any:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            return work(client)

    return await asyncio.to_thread(run)


def window_input(windows: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("windows", list(windows.shape), "FP32")
    tensor.set_data_from_numpy(windows, binary_data=binary)
    return tensor


def outputs_of(names: list[str], *, binary: bool) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


@contextmanager
def refused(status: int, message: str) -> Iterator[None]:
    with pytest.raises(InferenceServerException) as caught:
        yield
    assert caught.value.status() == str(status)
    assert message in caught.value.message()


def assert_answers(result: triton.InferResult, names: list[str], n_windows: int) -> None:
    """Exactly these outputs, with the backend's values to the bit."""
    expected = fake_prediction(n_windows, Options(return_features=True))
    assert [output["name"] for output in result.get_response()["outputs"]] == names
    for name in names:
        array = result.as_numpy(name)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, getattr(expected, name))


async def test_health_and_metadata(gateway: GatewayUnderTest, port: int) -> None:
    headers = gateway.bearer()

    def check(client: triton.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL, headers=headers)
        assert client.is_model_ready(MODEL, "1", headers=headers)
        assert not client.is_model_ready(MODEL, "99", headers=headers)
        assert not client.is_model_ready("other", headers=headers)
        assert client.get_server_metadata(headers=headers)["name"] == "sluice"
        model = client.get_model_metadata(MODEL, headers=headers)
        assert (model["name"], model["versions"]) == (MODEL, ["1"])
        assert model["inputs"] == [{"name": "windows", "datatype": "FP32", "shape": [-1, 50, 60]}]
        assert [output["name"] for output in model["outputs"]] == [*DEFAULT, *EXTRA]
        assert client.get_model_metadata(MODEL, "1", headers=headers)["versions"] == ["1"]
        with refused(404, "no such model"):
            client.get_model_metadata("other", headers=headers)

    await on_a_thread(port, check)


async def test_readiness_ends_with_the_arms_own(gateway: GatewayUnderTest, port: int) -> None:
    gateway.ray_serve.ready = gateway.legacy.ready = False

    def check(client: triton.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready(MODEL, headers=gateway.bearer())

    await on_a_thread(port, check)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
async def test_values_travel_as_bytes_or_json_both_ways(
    gateway: GatewayUnderTest, port: int, binary_in: bool, binary_out: bool
) -> None:
    windows = some_windows(3)

    def ask(client: triton.InferenceServerClient) -> triton.InferResult:
        return client.infer(
            MODEL,
            [window_input(windows, binary=binary_in)],
            outputs=outputs_of(DEFAULT, binary=binary_out),
            headers=gateway.bearer(),
        )

    assert_answers(await on_a_thread(port, ask), DEFAULT, 3)
    (call,) = gateway.calls()
    np.testing.assert_array_equal(call.windows, windows)


async def test_without_a_list_of_outputs_all_come_but_those_on_request(gateway: GatewayUnderTest, port: int) -> None:
    def ask(client: triton.InferenceServerClient) -> triton.InferResult:
        return client.infer(MODEL, [window_input(some_windows(2))], headers=gateway.bearer())

    assert_answers(await on_a_thread(port, ask), DEFAULT, 2)


async def test_outputs_come_as_and_when_they_are_requested(gateway: GatewayUnderTest, port: int) -> None:
    def ask(client: triton.InferenceServerClient) -> triton.InferResult:
        outputs = [*outputs_of(["features", "epistemic"], binary=True), *outputs_of(["ensemble_weights"], binary=False)]
        return client.infer(MODEL, [window_input(some_windows(2))], outputs=outputs, headers=gateway.bearer())

    assert_answers(await on_a_thread(port, ask), ["features", "epistemic", "ensemble_weights"], 2)
    assert gateway.calls()[0].options == Options(return_uncertainty=True, return_features=True)


async def test_the_id_comes_back_and_the_version_that_answered_is_named(gateway: GatewayUnderTest, port: int) -> None:
    def ask(client: triton.InferenceServerClient) -> triton.InferResult:
        return client.infer(
            MODEL, [window_input(some_windows(1))], request_id='order "17"', model_version="1", headers=gateway.bearer()
        )

    response = (await on_a_thread(port, ask)).get_response()
    assert {name: response[name] for name in ("id", "model_name", "model_version")} == {
        "id": 'order "17"',
        "model_name": MODEL,
        "model_version": "1",
    }


@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
async def test_bodies_are_compressed_as_the_client_wishes(
    gateway: GatewayUnderTest, port: int, request_coding: str | None, response_coding: str | None
) -> None:
    def ask(client: triton.InferenceServerClient) -> triton.InferResult:
        return client.infer(
            MODEL,
            [window_input(some_windows(2))],
            headers=gateway.bearer(),
            request_compression_algorithm=request_coding,
            response_compression_algorithm=response_coding,
        )

    assert_answers(await on_a_thread(port, ask), DEFAULT, 2)
    np.testing.assert_array_equal(gateway.calls()[0].windows, some_windows(2))


async def test_the_timeout_is_a_deadline_in_microseconds(gateway: GatewayUnderTest, port: int) -> None:
    gateway.ray_serve.gate.clear()
    gateway.legacy.gate.clear()

    def ask(client: triton.InferenceServerClient) -> None:
        with refused(504, "no answer before the deadline"):
            client.infer(MODEL, [window_input(some_windows(1))], timeout=50_000, headers=gateway.bearer())

    now = asyncio.get_running_loop().time()
    await on_a_thread(port, ask)
    assert gateway.calls()[0].deadline < now + 1.0
    assert asyncio.get_running_loop().time() - now < 1.8  # without a timeout it would be two seconds


async def test_refusals_arrive_with_their_sentence(gateway: GatewayUnderTest, port: int) -> None:
    def check(client: triton.InferenceServerClient) -> None:
        good = [window_input(some_windows(1))]
        with refused(400, "the shape of windows must be [B, 50, 60]"):
            client.infer(MODEL, [window_input(np.zeros((1, 60, 50), np.float32))], headers=gateway.bearer())
        with refused(401, "send a valid token"):
            client.infer(MODEL, good, headers={"Authorization": "Bearer a.b.c"})
        with refused(401, "send a valid token"):
            client.infer(MODEL, good)
        with refused(403, "the scope predict"):
            client.infer(MODEL, good, headers=gateway.bearer("ops"))
        with refused(404, "no such model"):
            client.infer("other", good, headers=gateway.bearer())
        with refused(404, "no such version"):
            client.infer(MODEL, good, model_version="99", headers=gateway.bearer())
        with refused(400, "the classification extension is not supported"):
            best = [triton.InferRequestedOutput("classification_probs", class_count=2)]
            client.infer(MODEL, good, outputs=best, headers=gateway.bearer())
        gateway.ray_serve.error = gateway.legacy.error = NotReady("away")
        with refused(503, "no model can answer yet"):
            client.infer(MODEL, good, headers=gateway.bearer())

    await on_a_thread(port, check)


async def test_statistics_count_what_was_asked(gateway: GatewayUnderTest, port: int) -> None:
    def check(client: triton.InferenceServerClient) -> None:
        for n_windows in (1, 4, 4):
            client.infer(MODEL, [window_input(some_windows(n_windows))], headers=gateway.bearer())
        gateway.ray_serve.error = gateway.legacy.error = ModelFailed("broken")
        with refused(502, "the model could not compute an answer"):
            client.infer(MODEL, [window_input(some_windows(1))], headers=gateway.bearer())
        (row,) = client.get_inference_statistics(MODEL, "1", headers=gateway.bearer())["model_stats"]
        assert (row["name"], row["version"], row["inference_count"], row["execution_count"]) == (MODEL, "1", 9, 3)
        assert row["last_inference"] == round(1000 * gateway.wall_clock())
        assert {name: figure["count"] for name, figure in row["inference_stats"].items()} == {
            "success": 3,
            "fail": 1,
            "queue": 3,
            "compute_input": 3,
            "compute_infer": 3,
            "compute_output": 3,
            "cache_hit": 0,
            "cache_miss": 0,
        }
        assert row["inference_stats"]["success"]["ns"] > row["inference_stats"]["compute_input"]["ns"] > 0
        assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in row["batch_stats"]] == [
            (1, 1),
            (4, 2),
        ]
        everything = client.get_inference_statistics(headers=gateway.bearer())
        assert everything == client.get_inference_statistics(MODEL, headers=gateway.bearer()) == {"model_stats": [row]}

    await on_a_thread(port, check)


async def test_many_requests_at_once_each_get_their_own_answer(gateway: GatewayUnderTest, port: int) -> None:
    def ask_all(_: triton.InferenceServerClient) -> None:
        with triton.InferenceServerClient(f"127.0.0.1:{port}", concurrency=8) as client:
            pending = [
                client.async_infer(MODEL, [window_input(some_windows(n))], request_id=str(n), headers=gateway.bearer())
                for n in range(1, 17)
            ]
            for n, request in enumerate(pending, start=1):
                result = request.get_result()
                assert result.get_response()["id"] == str(n)
                assert_answers(result, DEFAULT, n)

    await on_a_thread(port, ask_all)


async def test_the_asynchronous_client_works_alike(gateway: GatewayUnderTest, port: int) -> None:
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL, headers=gateway.bearer())
        assert (await client.get_server_metadata(headers=gateway.bearer()))["extensions"]
        assert (await client.get_model_metadata(MODEL, headers=gateway.bearer()))["versions"] == ["1"]
        for binary_in in (True, False):
            for binary_out in (True, False):
                for coding in (None, "gzip", "deflate"):
                    result = await client.infer(
                        MODEL,
                        [window_input(some_windows(2), binary=binary_in)],
                        outputs=outputs_of([*DEFAULT, *EXTRA], binary=binary_out),
                        request_id="a-1",
                        timeout=1_000_000,
                        headers=gateway.bearer(),
                        request_compression_algorithm=coding,
                        response_compression_algorithm=coding,
                    )
                    assert_answers(result, [*DEFAULT, *EXTRA], 2)
                    assert result.get_response()["id"] == "a-1"
        (row,) = (await client.get_inference_statistics(MODEL, headers=gateway.bearer()))["model_stats"]
        assert row["inference_count"] == 24
        with refused(400, "the shape of windows must be"):
            await client.infer(MODEL, [window_input(np.zeros((50, 60), np.float32))], headers=gateway.bearer())
        with refused(401, "send a valid token"):
            await client.infer(MODEL, [window_input(some_windows(1))])
