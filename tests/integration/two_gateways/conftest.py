"""One pair of gateways and one Redis for all tests of this folder; each leaves them as it found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.redis_server import RedisServer
from tests.integration.two_gateways.gateways import Gateways, Receiver


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="package")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    try:
        yield receiver
    finally:
        receiver.close()


@pytest.fixture(scope="package")
def gateways(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, receiver: Receiver) -> Iterator[Gateways]:
    gateways = Gateways(tmp_path_factory.mktemp("gateways"), redis, receiver)
    try:
        yield gateways
    finally:
        gateways.stop()
