"""One sleeping deployment for all of them, behind a gateway with Ray Serve alone and one with legacy beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.local_ray import LocalRay
from tests.integration import sleeper
from tests.integration.processes import GatewayProcess


@pytest.fixture(scope="session")
def deployed(ray_cluster: LocalRay) -> LocalRay:
    """Forward passes run on a thread, so that the replica can be asked while it sleeps."""
    sleeper.deploy(ray_cluster, inline_windows=0)
    return ray_cluster


@contextmanager
def serving(cluster: LocalRay, folder: Path, **settings: str) -> Iterator[GatewayProcess]:
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address, "GATEWAY_RATE_LIMIT": "10000000"}
    gateway = GatewayProcess(folder, environment | settings)
    try:
        gateway.wait_for("ray_serve")
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(scope="session")
def gateway(deployed: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """With Ray Serve alone: nobody makes good what fails or comes too late there."""
    with serving(deployed, tmp_path_factory.mktemp("gateway"), GATEWAY_LEGACY="off") as gateway:
        yield gateway


@pytest.fixture(scope="session")
def gateway_with_legacy(deployed: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """With a model in legacy that answers at once."""
    with serving(deployed, tmp_path_factory.mktemp("both"), GATEWAY_ENGINE="noop") as gateway:
        gateway.wait_for("legacy")
        yield gateway
