"""One Ray for the whole run, a gateway where a test asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.local_ray import LocalRay
from tests.integration.processes import GatewayProcess


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalRay]:
    """A one-node Ray with token authentication; CPUs are logical, so that several small replicas fit."""
    with LocalRay(num_cpus=8) as cluster:
        yield cluster


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Starts gateways, each with the environment given by keyword, and ends them after the test."""
    running: list[GatewayProcess] = []

    def start(**environment: str) -> GatewayProcess:
        running.append(GatewayProcess(tmp_path, environment))
        return running[-1]

    yield start
    for gateway in running:
        gateway.stop()
