"""The container files: well formed, closed by default, and in step with the code that they carry."""

from __future__ import annotations

import ast
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.secret_files import check_secret, read_secret_file
from app.settings import Settings, variable_of
from serve_app.serve_config import SERVE_ENV
from tests.integration.composed import read_compose

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
EDGE = ROOT / "docker" / "edge"
SERVICES: dict[str, Any] = read_compose()["services"]


def check(tool: str, *arguments: str | Path) -> None:
    command = [Path(sys.executable).with_name(tool), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def final_stage(dockerfile: Path) -> str:
    return re.split(r"^FROM ", dockerfile.read_text(), flags=re.MULTILINE)[-1]


def test_the_compose_file_keeps_the_specification() -> None:
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_the_dockerfiles_pass_their_linter() -> None:
    assert len(DOCKERFILES) == 2
    check("hadolint", *DOCKERFILES, EDGE / "Dockerfile")


def test_the_scripts_pass_their_linter() -> None:
    check("shellcheck", *(ROOT / "docker").glob("**/*.sh"), EDGE / "start", EDGE / "alive")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_carries_no_tools(dockerfile: Path) -> None:
    stage = final_stage(dockerfile)
    assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", stage, re.MULTILINE)
    assert not re.search(r"apt-get|pip install|gcc", stage)
    assert "--constraint constraints.txt" in dockerfile.read_text()


def test_the_edges_image_runs_as_nobody_special_and_has_all_its_files() -> None:
    stage = final_stage(EDGE / "Dockerfile")
    assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", stage, re.MULTILINE)
    copied = re.search(r"^COPY (.*) /opt/edge/$", stage, re.MULTILINE)
    assert copied is not None
    assert {*copied[1].split(), "Dockerfile", "make-certificate.sh"} == {path.name for path in EDGE.iterdir()}


def test_the_serving_image_installs_what_the_model_side_imports() -> None:
    """`train` and `search` run where models are made, not where they are served."""
    installed = re.search(r"pip install .*constraints\.txt \\\n(.*)", (ROOT / "docker/serve.Dockerfile").read_text())
    assert installed is not None
    packages = {re.sub(r"\W.*", "", word.strip('"')) for word in installed[1].split()}
    imported = set()
    for file in (ROOT / "serve_app").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())) if file.stem != "search" else ():
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names - {"serve_app"} == packages


def test_only_the_edge_is_published_and_only_on_loopback() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "edge": ["127.0.0.1:8443:8443"]
    }
    networks = read_compose()["networks"]
    for name, service in SERVICES.items():
        open_networks = {network for network in service.get("networks", ()) if not networks[network].get("internal")}
        assert open_networks == ({"outside"} if name == "edge" else set())


def test_the_gateway_believes_the_edge_and_nobody_else_about_addresses() -> None:
    edge = SERVICES["edge"]["networks"]["front"]["ipv4_address"]
    assert SERVICES["gateway"]["environment"]["GATEWAY_TRUSTED_PROXIES"] == edge


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "mem_limit" in service


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "environment" in service])
def test_environments_name_files_of_secrets_and_never_secrets(name: str) -> None:
    environment = SERVICES[name]["environment"]
    secrets = {key: value for key, value in environment.items() if re.search("SECRET|TOKEN|PASSWORD|KEY", key)}
    for value in secrets.values():
        assert value.removeprefix("/run/secrets/") in SERVICES[name]["secrets"]
    ours = {key for key in environment if key.startswith(("GATEWAY_", "EDGE_"))}
    edges = set(re.findall(r"^(?:read_)?setting (EDGE_\w+)", (EDGE / "start").read_text(), re.MULTILINE))
    assert ours <= {variable_of(field) for field in Settings.model_fields} | edges


def test_every_ray_node_shares_serves_settings_and_asks_for_the_token() -> None:
    nodes = [service for service in SERVICES.values() if service["command"][0] == "ray"]
    assert len(nodes) == 3
    for node in nodes:
        assert {key: value for key, value in node["environment"].items() if key.startswith("RAY_SERVE_")} == SERVE_ENV
        assert node["environment"]["RAY_AUTH_MODE"] == "token"
        # It lets Ray listen on loopback alone, which forbids a second node.
        assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in node["environment"]


def test_redis_refuses_to_write_before_its_container_is_full() -> None:
    options = dict(zip(SERVICES["redis"]["command"], SERVICES["redis"]["command"][1:], strict=False))
    assert options["--maxmemory-policy"] == "noeviction"  # what was lost would be a limit that was never reached
    sizes = [int(size.lower().removesuffix("b").removesuffix("m")) for size in (options["--maxmemory"], "256m")]
    assert SERVICES["redis"]["mem_limit"] == "256m"
    assert sizes[0] <= 0.8 * sizes[1]


def test_secrets_are_random_closed_and_made_once(tmp_path: Path) -> None:
    script = ROOT / "docker" / "make-secrets.sh"
    subprocess.run([script, tmp_path], check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    public = {"edge_ca.crt"}
    assert set(made) - public == {Path(secret["file"]).name for secret in read_compose()["secrets"].values()}
    assert {path.name for path in tmp_path.iterdir() if stat.S_IMODE(path.stat().st_mode) != 0o400} == public
    check_secret(read_secret_file(tmp_path / "jwt_secret"), "jwt_secret")
    assert made["jwt_secret"] != made["ray_token"]
    assert made["redis.conf"].split() == [b"requirepass", made["redis_password"]]
    subprocess.run([script, tmp_path], check=True, capture_output=True)
    assert made == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
