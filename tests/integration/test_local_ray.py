"""The local Ray keeps to itself and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.local_ray import LocalRay, descendants
from tests.integration.processes import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def listening_addresses(pids: set[int]) -> set[str]:
    """Local addresses of all listening sockets of these processes, from /proc."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalRay]:
    """One that nothing was deployed on: what an application opens is the application's to test."""
    with LocalRay(num_cpus=1) as cluster:
        yield cluster


def test_nothing_of_it_listens_beyond_loopback(cluster: LocalRay) -> None:
    family = {cluster.pid, *descendants(cluster.pid)}
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    found = listening_addresses(family)
    assert found
    assert found <= loopback


def test_strangers_are_refused(cluster: LocalRay) -> None:
    for path in ("/api/serve/applications/", "/api/jobs/"):
        assert httpx.get(cluster.dashboard_url + path, trust_env=False).status_code == 401


def test_no_other_user_of_the_host_gets_at_its_files(ray_cluster: LocalRay) -> None:
    assert stat.S_IMODE(ray_cluster.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(ray_cluster.token_file.stat().st_mode) == 0o600


def test_stop_leaves_neither_process_nor_folder(cluster: LocalRay) -> None:
    """The last to use it."""
    family = [cluster.pid, *descendants(cluster.pid)]
    assert len(family) > 1
    cluster.stop()
    assert [pid for pid in family if Path(f"/proc/{pid}").exists()] == []
    assert not cluster.directory.exists()


def test_it_ends_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import time; from app.local_ray import LocalRay\n"
        "ray = LocalRay(num_cpus=1); ray.start(); print(ray.pid, ray.directory, flush=True); time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    family = [int(pid), *descendants(int(pid))]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(Path(f"/proc/{member}").exists() for member in family), 60, "Ray to end")
    assert directory.startswith("/tmp/sluice-ray-")
    subprocess.run(["rm", "-rf", directory], check=True)
