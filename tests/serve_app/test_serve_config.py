from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.autoscaling import PROFILES
from serve_app.resources import GIB, SIZES
from serve_app.serve_config import (
    DEPLOYMENT_NAME,
    GRACEFUL_SHUTDOWN_TIMEOUT_S,
    HEALTH_CHECK_PERIOD_S,
    HEALTH_CHECK_TIMEOUT_S,
    MAX_BATCH_WINDOWS,
    SERVE_ENV,
    ServedApplication,
    ServedModel,
    build_config,
)


def deployment(**settings: Any) -> dict[str, Any]:
    (application,) = build_config(ServedApplication(**settings))["applications"]
    (deployment,) = application["deployments"]
    return dict(deployment)


def test_the_model_is_reached_by_handle_only() -> None:
    config = build_config(ServedApplication())
    assert config["proxy_location"] == "Disabled"
    assert config["applications"][0]["route_prefix"] is None
    assert config["logging_config"]["enable_access_log"] is False


def test_profile_size_and_model_arrive_where_serve_reads_them() -> None:
    serves = ServedModel(registry_path="/models", version="7", device="cuda")
    config = deployment(profile="market_hours", size="medium", serves=serves)
    assert config["name"] == DEPLOYMENT_NAME
    assert config["autoscaling_config"]["max_replicas"] == PROFILES["market_hours"].max_replicas
    assert config["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.5, "memory": 2 * GIB}
    assert config["user_config"] == {**serves.model_dump(), "gpu_share": 0.5}  # the replica bounds its memory by it


def test_a_relative_registry_is_made_absolute_for_the_replicas() -> None:
    assert deployment(serves=ServedModel(registry_path="models/"))["user_config"]["registry_path"].startswith("/")


def test_limits_leave_room_for_what_the_gateway_promises() -> None:
    config = deployment()
    assert config["max_ongoing_requests"] >= 4 * MAX_BATCH_WINDOWS
    assert config["max_queued_requests"] == -1
    assert GRACEFUL_SHUTDOWN_TIMEOUT_S > 2.0
    assert 3 * (HEALTH_CHECK_PERIOD_S + HEALTH_CHECK_TIMEOUT_S) < 20


def test_sizes_keep_the_figures_they_were_specified_with() -> None:
    assert {name: tuple(SIZES[name].model_dump().values()) for name in ("small", "medium", "large")} == {
        "small": (1, 0.25, GIB, GIB // 2),
        "medium": (2, 0.5, 2 * GIB, GIB),
        "large": (4, 1.0, 4 * GIB, 2 * GIB),
    }


def test_the_object_store_is_no_option_of_a_replica() -> None:
    for size in SIZES.values():
        assert set(size.actor_options(use_gpu=False)) <= {"num_cpus", "num_gpus", "memory"}


def test_a_gpu_share_is_taken_only_by_setting_and_refused_to_a_size_without_one() -> None:
    assert deployment(size="large")["ray_actor_options"]["num_gpus"] == 0
    with pytest.raises(ValueError, match="no GPU share"):
        deployment(size="local", serves=ServedModel(device="cuda"))


@pytest.mark.parametrize(
    "settings",
    [
        {"profile": "night"},
        {"size": "huge"},
        {"replicas": 2},
        {"name": "../x"},
        {"serves": {"engine": "magic"}},
        {"serves": {"device": "tpu"}},
        {"serves": {"threads": 0}},
        {"serves": {"sha": "x"}},
        {"queue": {"max_batch_size": 32}},
        {"queue": {"max_batch_windows": 0}},
    ],
)
def test_what_is_no_setting_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServedApplication.model_validate(settings)


def test_applications_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="name of its own"):
        build_config(ServedApplication(), ServedApplication())
    with pytest.raises(ValueError, match="at least one"):
        build_config()


def test_direct_ingress_stays_off() -> None:
    assert SERVE_ENV["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
