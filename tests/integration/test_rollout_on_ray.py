"""Rollouts by the commands of operators on a real Ray: nobody is lost, and a bad version goes back by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.local_ray import LocalRay
from app.serve_api import ServeApi
from serve_app.contract import APP_NAME
from serve_app.serve_config import ServedApplication, ServedModel
from tests.integration.open_loop import Load, Offer, Plan, Stream
from tests.integration.processes import ROOT, GatewayProcess, deploy, replica_pids

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

CALLERS, RATE_RPS = 60, 120.0
STORED_S = 0.25  # from what the controller decides to what is in force
WINDOW_HEX = np.random.default_rng(0).standard_normal((50, 60)).astype("<f4").tobytes().hex()
NEXT = f"{APP_NAME}-4"
BYSTANDER = "bystander"

BYSTANDING = {
    "name": BYSTANDER,
    "route_prefix": None,
    "import_path": "tests.integration.tiny_app:build",
    "args": {"replicas": 1},
    "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
}

STEPS = "".join(f"[[steps]]\nshare = {share}\nhold_s = 2\nsamples = 20\n" for share in (0.05, 0.25, 0.5, 1.0))
# What else runs on the machine is no fault of an arm: 0 lost is shown here, and slowness further below.
TO_RAY_SERVE = f"""
{STEPS}
[[guards]]
signal = "errors"
slack = 0.002
[[guards]]
signal = "invalid"
ratio = 0.0
slack = 0.001
"""
TO_VERSION_4 = f"""
name = "v3-to-v4"
stable = {{ backend = "ray_serve" }}
canary = {{ backend = "ray_serve", version = "4" }}
{STEPS.replace("hold_s = 2", "hold_s = 30")}
"""


class Site:
    """A gateway with both arms, told what its models do by files, and the operator's commands next to it.

    Legacy is a model of version 2; on Ray Serve are version 3 and, beside it, version 4. A pass takes 2 ms.
    """

    def __init__(self, ray: LocalRay, folder: Path, **environment: str) -> None:
        self.ray = ray
        self.folder = folder
        for version in ("2", "3", "4"):
            self.tell(version)
        self._environment = {
            **ray.environment,
            "RAY_ADDRESS": ray.address,
            "GATEWAY_RAY_DASHBOARD_URL": ray.dashboard_url,
            "GATEWAY_RAY_SERVE_FRACTION": "0",
            "GATEWAY_ROUTE_KEY_SUBJECTS": "desk",
            "GATEWAY_STICKY_KEY": "the same callers in every run",
            "GATEWAY_ENGINE": "faulty",
            "GATEWAY_FAULT_FILE": str(self.fault_file("2")),
            **environment,
        }
        self.gateway = GatewayProcess(folder, self._environment)

    def fault_file(self, version: str) -> Path:
        return self.folder / f"version-{version}.json"

    def tell(self, version: str, **fault: Any) -> None:
        """Have the model of this version behave so from now on."""
        new = self.folder / "fault.new"
        new.write_text(json.dumps({"version": version, "ms": 2, **fault}))
        new.rename(self.fault_file(version))

    def application(self, name: str, version: str) -> ServedApplication:
        return ServedApplication(
            name=name, serves=ServedModel(engine="faulty", fault_file=str(self.fault_file(version)))
        )

    def sluice(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """An operator's command, with what it printed; for its own model it is told by the file of version 3."""
        token = self.gateway.headers("ops admin", subject="ann")["Authorization"].removeprefix("Bearer ")
        environment = {"GATEWAY_FAULT_FILE": str(self.fault_file("3")), "SLUICE_TOKEN": token}
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *words, "--url", self.gateway.url],
            cwd=self.folder,
            env={**os.environ, **self._environment, "MODEL_REGISTRY_PATH": str(ROOT / "models"), **environment},
            check=check,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def migrate(self, plan: str, *words: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "plan.toml").write_text(plan)
        return self.sluice("migrate", "plan.toml", *words, check=False)

    def offer(self, rate_rps: float = RATE_RPS) -> Offer:
        """Callers who ask on and on, each for itself, for as long as no test takes."""
        headers = {**self.gateway.headers("predict"), "Content-Type": "application/octet-stream"}
        callers = [
            Stream(
                name := f"caller-{n}",
                self.gateway.port,
                "/ray-serve/predict",
                {**headers, "X-Route-Key": name},
                rate_rps / CALLERS,
                WINDOW_HEX,
                connections=1,
            )
            for n in range(CALLERS)
        ]
        return Offer(Plan(callers, 200.0))

    def rollout(self) -> dict[str, Any]:
        with self.gateway.client() as client:
            return dict(client.get("/rollout").json())

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / ".run/state/audit.jsonl").read_bytes().splitlines()]

    def pids(self, app: str) -> list[int]:
        return replica_pids(self.ray, app)

    def applications(self) -> dict[str, Any]:
        with self.dashboard() as api:
            return dict(api.instance()["applications"])

    def dashboard(self) -> ServeApi:
        return ServeApi(self.ray.dashboard_url, token=self.ray.token_file.read_text())

    def close(self) -> None:
        self.gateway.stop()
        with self.dashboard() as api:
            api.delete([APP_NAME, NEXT, BYSTANDER])


@pytest.fixture(scope="module")
def whole(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(ray_cluster, tmp_path_factory.mktemp("rollout"))
    try:
        site.gateway.wait_for("legacy")
        yield site
    finally:
        site.close()


@pytest.fixture
def site(whole: Site) -> Site:
    """Everybody on legacy."""
    for version in ("2", "3", "4"):
        whole.tell(version)
    whole.sluice("rollback", "--to", "legacy")
    return whole


@pytest.fixture
def shipped(ray_cluster: LocalRay, tmp_path: Path) -> Iterator[Site]:
    """Everybody on legacy, which is the shipped model."""
    site = Site(ray_cluster, tmp_path, GATEWAY_ENGINE="torch")
    try:
        site.gateway.wait_for("legacy")
        yield site
    finally:
        site.close()


@pytest.fixture
def upgraded(site: Site) -> Site:
    """Everybody on version 3 on Ray Serve, and version 4 beside it."""
    for name, version in ((APP_NAME, "3"), (NEXT, "4")):
        if not site.pids(name):
            deploy(site.ray, site.application(name, version))
    site.gateway.wait_for("ray_serve")
    site.sluice("rollout", "set", "1")
    return site


def test_everybody_is_moved_under_load_and_no_request_is_lost(site: Site) -> None:
    move_everybody(site, TO_RAY_SERVE, "--engine", "faulty")


@pytest.mark.slow
def test_the_shipped_model_is_moved_under_load_and_keeps_the_default_guards(shipped: Site) -> None:
    move_everybody(shipped, STEPS.replace("hold_s = 2\nsamples = 20", "hold_s = 10\nsamples = 200"))


def move_everybody(site: Site, plan: str, *words: str) -> None:
    """Run the whole plan by the command under a steady load, and look at what became of each request."""
    offer = site.offer()
    command = site.migrate(plan, *words)
    moved_at = time.monotonic()
    time.sleep(1)
    load = offer.finish(now=True)
    print(f"\n{command.stdout}{command.stderr}{summary(load)}, {moved_at - offer.began:.1f} s")

    assert command.returncode == 0, command.stderr
    assert [f"step {step} of 4, running" in command.stdout for step in (1, 2, 3, 4)] == [True] * 4
    assert command.stdout.splitlines()[-1] == "done: ray_serve has 100.00% of the callers"
    assert load.statuses.keys() == {200}
    assert {result.arm for result in load.results if result.sent > moved_at} == {"ray_serve"}
    assert callers_that_came_back(load) == []
    assert site.rollout()["run"]["phase"] == "done"


@pytest.mark.parametrize(
    ("fault", "is_affected"),
    [
        pytest.param({"behaviour": "nan"}, lambda result: "x-fallback" in result.headers, id="NaN"),
        pytest.param({"ms": 100}, lambda result: result.version == "4", id="ten times slower"),
    ],
)
def test_a_bad_version_goes_back_by_itself_and_every_caller_has_an_answer(
    upgraded: Site, fault: dict[str, Any], is_affected: Any
) -> None:
    upgraded.tell("4", **fault)
    offer = upgraded.offer()
    time.sleep(1)
    command = upgraded.migrate(TO_VERSION_4, "--no-deploy")
    time.sleep(1)
    load = offer.finish(now=True)
    document = upgraded.rollout()
    back_at = document["changed_at"] - time.time() + time.monotonic()
    affected = [result for result in load.results if is_affected(result)]
    print(f"\n{command.stdout}{command.stderr}{summary(load)}")
    assert affected
    print(f"back {back_at - affected[0].sent:.2f} s after the first request to it, {len(affected)} were affected")

    assert command.returncode == 1
    assert "rolled back by controller" in command.stderr
    assert (document["run"]["phase"], document["share"], document["canary"]) == ("rolled_back", 0.0, "ray_serve@4")
    assert load.statuses.keys() == {200}
    later = [result for result in load.results if result.sent > back_at + STORED_S]
    assert later
    assert {(result.version, is_affected(result)) for result in later} == {("3", False)}
    [*_, record] = upgraded.audit()
    assert (record["action"], record["who"]) == ("rollback", "controller")
    assert any(guard["breached"] for guard in record["evidence"]["guards"])
    assert upgraded.sluice("rollout", "show").returncode == 0


def test_only_what_serves_nobody_is_deleted_and_is_gone_when_the_command_ends(upgraded: Site) -> None:
    with upgraded.dashboard() as api:
        api.put({"proxy_location": "Disabled", "applications": [BYSTANDING]})
        api.wait_running(BYSTANDER, timeout_s=60, on_progress=print, clock=time.monotonic)
    bystanding, serving = upgraded.pids(BYSTANDER), upgraded.pids(APP_NAME)
    offer = upgraded.offer(30.0)
    (upgraded.folder / "plan.toml").write_text(TO_VERSION_4)
    upgraded.sluice("rollout", "start", "plan.toml")
    began = time.monotonic()
    beside = upgraded.sluice("rollback", "--delete", "--yes")
    beside_s, after_beside = time.monotonic() - began, upgraded.applications()
    everything = upgraded.sluice("rollback", "--to", "legacy", "--delete", "--yes")
    after_everything = upgraded.applications()
    load = offer.finish(now=True)
    print(f"\n{beside.stderr}{everything.stderr}{beside_s:.1f} s, {summary(load)}")

    assert NEXT not in after_beside
    assert upgraded.rollout()["stable"] == "legacy"
    assert after_beside[APP_NAME]["status"] == "RUNNING"
    assert set(after_beside) - set(after_everything) == {APP_NAME}
    assert (upgraded.pids(BYSTANDER), len(bystanding), len(serving)) == (bystanding, 1, 1)
    assert load.statuses.keys() == {200}


def summary(load: Load) -> str:
    arms = Counter(f"{result.arm} {result.version}" for result in load.answered)
    rescued = sum("x-fallback" in result.headers for result in load.results)
    lost = len(load.results) - len(load.answered)
    return f"{len(load.results)} requests, {lost} lost, {rescued} by fallback, {dict(arms)}"


def callers_that_came_back(load: Load) -> list[str]:
    """Who was answered by legacy, as its own arm, after Ray Serve was."""
    moved, back = set[str](), list[str]()
    for result in sorted(load.answered, key=lambda result: result.sent):
        if result.arm == "ray_serve":
            moved.add(result.stream)
        elif result.stream in moved and "x-fallback" not in result.headers:
            back.append(result.stream)
    return back
