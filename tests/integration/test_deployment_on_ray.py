"""The deployment on a real Ray: deployed by REST, called through its handle, changed in place, killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from app.local_ray import LocalRay
from app.serve_api import ServeApi
from serve_app import features
from serve_app.autoscaling import PROFILES, ProfileName
from serve_app.contract import FloatArray, InvalidWindows, Options, Prediction
from serve_app.engine import load_engine
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import Registry
from serve_app.serve_config import EngineName, ServedApplication, ServedModel, build_config
from serve_app.signing import Signer, generate
from tests.integration.processes import replica_rows, running_pids
from tests.integration.test_local_ray import listening_addresses
from tests.serve_app.model_files import system_call

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # Ray's own code warns while it is imported and while it closes
]

APP = "deployment_test"
WINDOWS = np.random.default_rng(2).standard_normal((70, 50, 60), dtype=np.float32)
EVERYTHING = Options(return_uncertainty=True, use_ensemble=True, return_features=True)


def publish(registry: Registry, seed: int, weights: bytes | None = None) -> str:
    model = HybridModel(ModelConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return registry.publish(
        "cnn_lstm",
        files={"model.safetensors": weights or safetensors.torch.save(state), "config.json": b"{}"},
        feature_names=features.FEATURE_NAMES,
        features_fingerprint=features.fingerprint(),
        scaler_fingerprint="0" * 64,
        training={"seed": seed, "data_sha256": "0" * 64, "held_out_from": {}},
    )


class Served:
    """The application under test, what an operator does to it, and a driver's event loop to call it from."""

    def __init__(self, api: ServeApi, registry_path: Path) -> None:
        self.api = api
        self.registry_path = registry_path
        self._loop = asyncio.new_event_loop()  # with our settings of Serve, a handle lives on one loop
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(self._ask(method, args, kwargs), self._loop).result()

    async def _ask(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from ray import serve

        handle = serve.get_app_handle(APP)
        return await asyncio.wait_for(getattr(handle, method).remote(*args, **kwargs), 30)

    def deploy(
        self,
        version: str,
        *,
        replicas: tuple[int, int] = (2, 2),
        key: Path | None = None,
        engine: EngineName = "torch",
        exact: bool = False,
        **autoscaling: float,
    ) -> None:
        serves = ServedModel(
            registry_path=str(self.registry_path),
            version=version,
            registry_key_path=key and str(key),
            engine=engine,
            exact=exact,
        )
        config = build_config(ServedApplication(name=APP, serves=serves))
        bounds = {"min_replicas": replicas[0], "max_replicas": replicas[1], **autoscaling}
        config["applications"][0]["deployments"][0]["autoscaling_config"].update(bounds)
        self.api.put(config)

    def rows(self) -> list[dict[str, Any]]:
        return replica_rows(self.api, APP)

    def pids(self) -> set[int]:
        return set(running_pids(self.rows()))

    def call(self, n: int = 1, options: Options = EVERYTHING) -> Prediction:
        return self.call_with(WINDOWS[:n], options)

    def call_with(self, windows: FloatArray, options: Options = EVERYTHING) -> Prediction:
        return Prediction.unpack(self.ask("predict_packed", windows.tobytes(), tuple(options), 25.0))

    def stats(self) -> list[dict[str, Any]]:
        """What each replica says of itself; asked again while all are away from routing, to take a change."""
        from ray.serve.exceptions import DeploymentUnavailableError

        deadline = time.monotonic() + 60
        while True:
            try:
                return list(asyncio.run_coroutine_threadsafe(self._broadcast("get_stats"), self._loop).result())
            except DeploymentUnavailableError:
                assert time.monotonic() < deadline, "no replica is back"
                time.sleep(0.2)

    async def _broadcast(self, method: str) -> Any:
        from ray import serve

        return await serve.get_app_handle(APP).broadcast(method).results_async(timeout_s=10)


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> float:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < timeout_s, "did not happen in time"
        time.sleep(0.2)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def registry_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        publish(Registry(path), seed)
    return path


@pytest.fixture(scope="module")
def served(ray_cluster: LocalRay, registry_path: Path) -> Iterator[Served]:
    os.environ.update(ray_cluster.environment)  # read when Ray is imported, hence the late imports
    import ray
    from ray import serve

    ray.init(address=ray_cluster.address, log_to_driver=False, logging_level="ERROR")
    with ServeApi(ray_cluster.dashboard_url, token=ray_cluster.token_file.read_text()) as api:
        application = Served(api, registry_path)
        application.deploy("1")
        api.wait_running(APP, timeout_s=90, on_progress=lambda line: None, clock=time.monotonic)
        yield application
    serve.delete(APP)
    application.close()
    ray.shutdown()


def assert_same(answer: Prediction, expected: Prediction) -> None:
    for name in ("classification_probs", "regression_pred", "regression_uncertainty", "ensemble_weights", "features"):
        np.testing.assert_allclose(getattr(answer, name), getattr(expected, name), atol=1e-5)


def test_no_key_of_the_configuration_is_unknown_to_serve(served: Served) -> None:
    # Serve drops what it does not know without a word, so that a typo would show only as a default.
    from ray.serve.schema import ServeDeploySchema

    def compare(ours: Any, theirs: Any, where: str = "") -> None:
        if isinstance(ours, dict):
            for key, value in ours.items():
                assert key in theirs, f"{where}.{key}"
                compare(value, theirs[key], f"{where}.{key}")
        elif isinstance(ours, list):
            for index, value in enumerate(ours):
                compare(value, theirs[index], f"{where}.{index}")
        else:
            assert ours == theirs, where

    config = build_config(ServedApplication(profile="market_hours", size="medium", env_vars={"A": "b"}))
    compare(config, ServeDeploySchema.model_validate(config).model_dump(mode="json"))


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_serve_has_no_objection_to_a_profile(served: Served, name: ProfileName) -> None:
    from ray.serve.config import AutoscalingConfig

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Serve announces this one as outdated and has nothing yet that works in its place.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        settings = AutoscalingConfig(**PROFILES[name].autoscaling_config())
    assert settings.metrics_interval_s == PROFILES[name].metrics_interval_s


def test_no_replica_listens_beyond_the_address_of_its_node(served: Served) -> None:
    addresses = listening_addresses(served.pids())
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, in both tables of the kernel


def test_the_handle_answers_what_the_bare_engine_answers(served: Served) -> None:
    engine = load_engine(Registry(served.registry_path).load("cnn_lstm", "1"))
    for n in (1, 32, 70):
        answer = served.call(n)
        assert len(answer) == n
        assert_same(answer, engine.predict(WINDOWS[:n], EVERYTHING))


def test_a_direct_call_takes_one_window_and_answers_arrays(served: Served) -> None:
    answer = served.ask("__call__", WINDOWS[0], return_uncertainty=False, use_ensemble=False)
    assert answer["classification_probs"].shape == (1, 3)
    assert (answer["regression_uncertainty"], answer["ensemble_weights"], answer["features"]) == (None, None, None)
    assert answer["model_version"] == "1"
    assert answer["processing_time_ms"] > 0


def test_refusals_keep_their_type_across_the_handle(served: Served) -> None:
    with pytest.raises(InvalidWindows):
        served.ask("predict_packed", b"short", tuple(EVERYTHING), 5.0)
    with pytest.raises(InvalidWindows):
        served.ask("__call__", WINDOWS[0].T)


def test_many_callers_at_once_each_get_their_own_answer(served: Served) -> None:
    engine = load_engine(Registry(served.registry_path).load("cnn_lstm", "1"))
    expected = engine.predict(WINDOWS, EVERYTHING)

    with ThreadPoolExecutor(16) as callers:
        for row, answer in enumerate(
            callers.map(lambda row: served.call_with(WINDOWS[row : row + 1]), range(len(WINDOWS)))
        ):
            assert_same(answer, expected.rows(row, row + 1))


def test_each_replica_tells_its_own_figures(served: Served) -> None:
    rows = served.stats()
    assert len(rows) == 2
    assert sum(row["window_count"] for row in rows) >= 1
    for row in rows:
        assert row["model_version"] == "1"
        assert row["device"] == "cpu"
        assert row["memory"] == {"allocated_mb": 0, "reserved_mb": 0, "utilization_pct": 0}


def test_a_version_changes_in_place_and_a_broken_one_changes_nothing(served: Served) -> None:
    before = served.pids()
    served.deploy("2")
    wait_until(lambda: {row["model_version"] for row in served.stats()} == {"2"})
    served.deploy("9")
    wait_until(lambda: all(row["rejected"] for row in served.stats()))
    assert {row["model_version"] for row in served.stats()} == {"2"}
    assert served.call().model_version == "2"
    served.deploy("2")
    wait_until(lambda: not any(row["rejected"] for row in served.stats()))
    served.deploy("1")
    wait_until(lambda: {row["model_version"] for row in served.stats()} == {"1"})
    assert served.stats()[0]["rejected"] is None
    wait_until(lambda: served.pids() == before)  # a replica that takes a change is away from routing meanwhile


def test_the_engine_changes_in_place_and_says_how_it_was_chosen(served: Served) -> None:
    def remarks() -> list[str]:
        return [row["engine_remark"] for row in served.stats()]

    served.deploy("1", engine="auto")
    wait_until(lambda: [remark[:4] for remark in remarks()] == ["auto", "auto"])
    assert {row["engine"] for row in served.stats()} <= {"torch", "onnxruntime", "openvino"}
    served.deploy("1", exact=True)
    wait_until(lambda: remarks() == ["exact", "exact"])
    together = served.call(8)
    for row in range(8):
        alone = served.call_with(WINDOWS[row : row + 1])
        for name, array in alone._arrays():
            np.testing.assert_array_equal(array[0], getattr(together, name)[row], err_msg=name)
    served.deploy("1")
    wait_until(lambda: remarks() == ["", ""])


def test_evil_versions_are_rejected_with_their_reason_and_the_old_one_serves_on(served: Served, tmp_path: Path) -> None:
    registry = Registry(served.registry_path)
    evil = publish(registry, seed=3, weights=system_call(tmp_path / "canary"))
    generate(tmp_path / "registry.key", tmp_path / "registry.pub")
    for version, key, reason in ((evil, None, "no safetensors file"), ("2", tmp_path / "registry.pub", "not signed")):
        served.deploy(version, key=key)
        wait_until(
            lambda reason=reason: all(reason in (row["rejected"] or {"reason": ""})["reason"] for row in served.stats())
        )
        assert {row["model_version"] for row in served.stats()} == {"1"}
        assert served.call().model_version == "1"
    assert not (tmp_path / "canary").exists()
    Registry(served.registry_path, signer=Signer.from_file(tmp_path / "registry.key")).sign("cnn_lstm", "2")
    served.deploy("1")
    wait_until(lambda: not any(row["rejected"] for row in served.stats()))  # Serve forgets a version it no longer wants
    served.deploy("2", key=tmp_path / "registry.pub")
    wait_until(lambda: {row["model_version"] for row in served.stats()} == {"2"})
    served.deploy("1")
    wait_until(lambda: {row["model_version"] for row in served.stats()} == {"1"})
    wait_until(lambda: len(served.pids()) == 2)


def test_a_killed_replica_is_replaced(served: Served) -> None:
    wait_until(lambda: len(served.pids()) == 2)
    victim = min(served.pids())
    os.kill(victim, signal.SIGKILL)
    served.call()
    print(f"replaced after {wait_until(lambda: len(served.pids() - {victim}) == 2):.1f} s")
    served.call()


def test_a_hung_replica_is_replaced_within_twenty_seconds(served: Served) -> None:
    wait_until(lambda: len(served.pids()) == 2)
    victim = min(served.pids())
    os.kill(victim, signal.SIGSTOP)
    took_s = wait_until(lambda: len(served.pids() - {victim}) == 2)
    print(f"replaced after {took_s:.1f} s")
    assert took_s <= 20


def test_replicas_follow_the_windows_that_wait_and_not_the_calls(served: Served) -> None:
    quick = {"target_ongoing_requests": 8.0, "upscale_delay_s": 1.0, "look_back_period_s": 2.0}
    served.deploy("1", replicas=(1, 1), **quick)
    wait_until(lambda: [row["state"] for row in served.rows()] == ["RUNNING"])
    (first,) = served.pids()
    served.deploy("1", replicas=(1, 2), **quick)
    time.sleep(5)
    assert served.pids() == {first}, "an idle replica stays alone"

    # One call at a time never reaches a target of 8 calls; its 256 windows do reach a target of 8 windows.
    windows = np.concatenate([WINDOWS] * 4)[:256]
    started = time.monotonic()
    while time.monotonic() < started + 60 and len(served.pids()) < 2:
        served.call_with(windows)
    assert len(served.pids()) == 2
    print(f"a second replica after {time.monotonic() - started:.1f} s")
