"""Real processes for the integration tests: one Ray for the whole run, a gateway where a test asks for one."""

from collections.abc import Iterator

import pytest

from app.local_ray import LocalRay


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalRay]:
    """A one-node Ray with token authentication; CPUs are logical, so that several small replicas fit."""
    with LocalRay(num_cpus=8) as cluster:
        yield cluster
