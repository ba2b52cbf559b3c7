"""The configuration as it is shipped: the promised values, and a start that refuses bad settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from app.settings import Settings
from tests.docker.edge.process import FILES, USER, EdgeProcess, make_certificate
from tests.integration.composed import read_compose

pytestmark = pytest.mark.integration


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place that the edge's user can reach, with its files and a certificate."""
    folder = Path(tempfile.mkdtemp(prefix="edge-", dir="/tmp"))
    shutil.copytree(FILES, folder / "etc")
    make_certificate(folder)
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, USER)
    yield folder
    shutil.rmtree(folder)


def check(
    folder: Path, *, as_root: bool = False, arguments: Sequence[str] = ("--check",), **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "EDGE_RUN": str(folder / "run"),
        "EDGE_CERTIFICATE": str(folder / "edge.crt"),
        "EDGE_KEY": str(folder / "edge.key"),
        "EDGE_GATEWAYS": "127.0.0.1:8000",
        "EDGE_ACCESS_LOG": str(folder / "log"),
        **settings,
    }
    user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 and not as_root else {}
    return subprocess.run(
        [folder / "etc" / "start", *arguments],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=10,
        **user,
    )


def test_the_shipped_configuration_is_taken_without_a_warning(folder: Path) -> None:
    result = check(folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    "promise",
    [
        "client_header_timeout 5s;",
        "client_body_timeout 2s;",
        "send_timeout 10s;",
        "keepalive_timeout 60s;",
        "keepalive_timeout 4s;",
        "keepalive_requests 1000;",
        "client_header_buffer_size 2k;",
        "large_client_header_buffers 2 7k;",
        "max_headers 100;",
        "client_max_body_size 1048576;",
        "limit_conn connections 64;",
        "limit_conn requests_at_once 64;",
        "http2_max_concurrent_streams 32;",
        "proxy_read_timeout 2500ms;",
        "proxy_next_upstream error timeout;",
        "server_tokens off;",
        "ssl_protocols TLSv1.2 TLSv1.3;",
        "ssl_session_tickets off;",
        "server_name localhost 127.0.0.1;",
    ],
)
def test_what_is_promised_is_what_is_set(folder: Path, promise: str) -> None:
    check(folder)
    assert promise in (folder / "run" / "nginx.conf").read_text()


def test_the_gateway_and_the_edge_agree(folder: Path) -> None:
    gateway = {name: field.default for name, field in Settings.model_fields.items()}
    check(folder)
    configuration = (folder / "run" / "nginx.conf").read_text()
    assert f"client_max_body_size {gateway['max_body_bytes']};" in configuration
    found = re.search(r"proxy_read_timeout (\d+)ms;", configuration)
    assert found is not None
    assert gateway["max_timeout_ms"] < int(found[1]) <= gateway["max_timeout_ms"] + 500
    kept = re.search(r"keepalive_timeout (\d+)s;\n\s+keepalive_requests 10000", configuration)
    assert kept is not None
    assert 1000 * int(kept[1]) < gateway["drain_notice_ms"]


def test_no_name_is_left_unfilled(folder: Path) -> None:
    check(folder)
    for file in ("nginx.conf", "admission.conf", "refusals.conf"):
        assert not re.search(r"@[A-Z_]+@", (folder / "run" / file).read_text())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EDGE_LISTEN", "443"),
        ("EDGE_LISTEN", "0.0.0.0:443; }"),
        ("EDGE_HOSTS", "a.example; deny all"),
        ("EDGE_HOSTS", "a.example\nb.example"),
        ("EDGE_GATEWAYS", "http://gateway:8000"),
        ("EDGE_GATEWAYS", "gateway"),
        ("EDGE_OPS_NETWORKS", "everybody"),
        ("EDGE_OPS_NETWORKS", "1.2.3"),
        ("EDGE_OPS_NETWORKS", "10.0.0.0/8 1.2.3.256"),
        ("EDGE_OPS_NETWORKS", "10.0.0.0/33"),
        ("EDGE_OPS_NETWORKS", "abcd"),
        ("EDGE_OPS_NETWORKS", "2001:db8::/129"),
        ("EDGE_MAX_BODY_BYTES", "0"),
        ("EDGE_MAX_BODY_BYTES", "1m"),
        ("EDGE_HEADER_TIMEOUT_S", "-1"),
        ("EDGE_CONNECTIONS_PER_ADDRESS", "none"),
        ("EDGE_KEY", "key; include /etc/passwd"),
        ("EDGE_WORKERS", "auto; user root"),
    ],
)
def test_a_setting_of_another_form_ends_the_start_with_its_name(folder: Path, name: str, value: str) -> None:
    result = check(folder, **{name: value})
    assert result.returncode == 78
    assert result.stderr.startswith(f"edge: {name} ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "networks", ["none", "10.0.0.0/8 10.1.2.3", "2001:db8::/32 ::1 fe80::1:2/128", "192.0.2.255/32", "1:2:3:4:5:6:7:8"]
)
def test_networks_of_operators_are_taken(folder: Path, networks: str) -> None:
    result = check(folder, EDGE_OPS_NETWORKS=networks)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "wrong", [{"EDGE_OPS_NETWORKS": "1::2::3"}, {"EDGE_ALIVE_PORT": "70000"}, {"EDGE_KEY": "/nowhere/edge.key"}]
)
@pytest.mark.parametrize("arguments", [["--check"], []], ids=["checked", "started"])
def test_what_nginx_does_not_take_ends_the_start_too(folder: Path, wrong: dict[str, str], arguments: list[str]) -> None:
    result = check(folder, arguments=arguments, **wrong)
    assert result.returncode == 78
    assert result.stderr.endswith("edge: nginx does not take these settings\n")


def test_the_edges_temporary_files_have_room_for_several_addresses(folder: Path) -> None:
    service = read_compose()["services"]["edge"]
    (mount,) = service["tmpfs"]
    size = re.search(r"size=(\d+)m", mount)
    assert size is not None
    check(folder)
    configuration = (folder / "run" / "nginx.conf").read_text()
    connections, body_bytes = (
        int(found[1])
        for name in ("limit_conn requests_at_once", "client_max_body_size")
        if (found := re.search(rf"{name} (\d+);", configuration))
    )
    assert int(size[1]) << 20 >= 8 * connections * body_bytes
    assert service["mem_limit"] == "1g"  # the files are memory, too


@pytest.mark.parametrize("user", ["root"] if os.geteuid() == 0 else [])
def test_root_is_refused(folder: Path, user: str) -> None:
    result = check(folder, as_root=True)
    assert (result.returncode, result.stderr) == (78, "edge: must not run as root\n")


def test_it_runs_as_nobody_special(edge: EdgeProcess) -> None:
    for pid in (edge.pid, *edge.worker_pids()):
        status = Path(f"/proc/{pid}/status").read_text()
        user = re.search(r"^Uid:\t(\d+)\t(\d+)\t(\d+)", status, re.MULTILINE)
        assert user is not None
        assert "0" not in user.groups()
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)


def test_it_writes_in_its_folder_alone(edge: EdgeProcess) -> None:
    """A read-only root is enough for it."""
    for pid in (edge.pid, *edge.worker_pids()):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            flags = int(Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text().split()[3], 8)
            if target.startswith("/") and flags & (os.O_WRONLY | os.O_RDWR):
                assert target == "/dev/null" or target.startswith(f"{edge.folder}/"), target
