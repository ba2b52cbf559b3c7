"""An unchanged Triton client at a gateway process, on the shipped model behind both arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from app.local_ray import LocalRay
from serve_app.bars import load_bars
from serve_app.contract import Options
from serve_app.engine import load_engine
from serve_app.features import latest_window
from serve_app.registry import Registry
from serve_app.serve_config import ServedApplication, ServedModel
from tests.integration.processes import ROOT, GatewayProcess, deploy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MODEL = "cnn_lstm"
OUTPUTS = (
    "classification_probs",
    "regression_pred",
    "regression_uncertainty",
    "aleatoric",
    "epistemic",
    "ensemble_weights",
    "features",
)


@pytest.fixture
def gateway(ray_cluster: LocalRay, start_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    """Both arms serve the shipped version."""
    deploy(ray_cluster, ServedApplication(serves=ServedModel(registry_path=str(ROOT / "models"))))
    gateway = start_gateway(**ray_cluster.environment, RAY_ADDRESS=ray_cluster.address)
    gateway.wait_for("ray_serve")
    gateway.wait_for("legacy")
    return gateway


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(gateway.url.removeprefix("http://")) as client:
        yield client


def window_input(windows: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput("windows", list(windows.shape), "FP32")
    tensor.set_data_from_numpy(windows)
    return tensor


def test_a_triton_client_gets_the_engine_s_own_answer_from_both_arms(
    gateway: GatewayProcess, client: triton.InferenceServerClient
) -> None:
    windows = np.stack([latest_window(load_bars(symbol).ohlcv) for symbol in ("MSFT", "AAPL")]).astype(np.float32)
    expected = load_engine(Registry(ROOT / "models").load(MODEL)).predict(windows, Options(return_features=True))
    requested = [triton.InferRequestedOutput(name) for name in OUTPUTS]
    (version,) = client.get_model_metadata(MODEL, headers=gateway.headers())["versions"]
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, version, headers=gateway.headers())
    with gateway.client() as operator:
        for fraction in (1.0, 0.0):
            assert operator.put("/rollout", json={"ray_serve_fraction": fraction}).status_code == 200
            result = client.infer(
                MODEL,
                [window_input(windows)],
                model_version=version,
                outputs=requested,
                headers=gateway.headers(),
                request_compression_algorithm="gzip",
                response_compression_algorithm="deflate",
            )
            assert result.get_response()["model_version"] == version
            for name in OUTPUTS:
                np.testing.assert_allclose(result.as_numpy(name), getattr(expected, name), atol=1e-5)
        windows_by_arm = operator.get("/stats").json()["windows"]
    assert windows_by_arm == {"ray_serve": 2, "legacy": 2}
    (row,) = client.get_inference_statistics(MODEL, version, headers=gateway.headers())["model_stats"]
    assert (row["inference_count"], row["execution_count"]) == (4, 2)
    assert row["inference_stats"]["compute_infer"]["ns"] > 0
    with pytest.raises(InferenceServerException, match="no such version is served"):
        client.infer(MODEL, [window_input(windows)], model_version="99", headers=gateway.headers())
