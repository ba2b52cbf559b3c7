"""One edge before notes, one before a real gateway, for all tests that change neither."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docker.edge.process import EdgeProcess, missing
from tests.docker.edge.recorder import Recorder
from tests.integration.processes import GatewayProcess

GATEWAY = {"GATEWAY_LEGACY": "in_process", "GATEWAY_ENGINE": "noop", "GATEWAY_TRUSTED_PROXIES": "127.0.0.1"}


@pytest.fixture(scope="session", autouse=True)
def nginx() -> None:
    if reason := missing():
        pytest.skip(f"there is no nginx with its stream module: {reason}")


@pytest.fixture(scope="session")
def shared_recorder(nginx: None) -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


@pytest.fixture
def recorder(shared_recorder: Recorder) -> Recorder:
    shared_recorder.forget()
    return shared_recorder


@pytest.fixture(scope="session")
def edge(shared_recorder: Recorder) -> Iterator[EdgeProcess]:
    """The edge as it is shipped, and the recorder behind it."""
    with EdgeProcess([shared_recorder.address]) as edge:
        yield edge


@pytest.fixture(scope="session")
def gateway(nginx: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path_factory.mktemp("gateway"), GATEWAY)
    try:
        gateway.wait_for("legacy")
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(scope="session")
def front(gateway: GatewayProcess) -> Iterator[EdgeProcess]:
    """The edge as it is shipped, and a real gateway behind it; operators come from 127.0.0.9."""
    with EdgeProcess([f"127.0.0.1:{gateway.port}"], EDGE_OPS_NETWORKS="127.0.0.9/32 10.0.0.0/8") as front:
        yield front
