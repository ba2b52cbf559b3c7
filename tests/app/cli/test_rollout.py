"""`sluice rollout` against a gateway that listens, over fake backends."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import cli, terminal
from app.cli.rollout import idle_applications, our_applications
from app.rollout.plan import Plan
from serve_app.serve_config import IMPORT_PATH
from tests.app.cli.command import EX_CONFIG
from tests.app.test_over_sockets import listening
from tests.app.under_test import GatewayUnderTest, MakeGateway

Sluice = Callable[..., Any]

SLOW_PLAN = """
name = "slow"
[[steps]]
share = 0.05
hold_s = 3600
samples = 40
gate = "manual"
[[steps]]
share = 1.0
"""


@pytest.fixture
async def gateway(make_gateway: MakeGateway) -> AsyncIterator[GatewayUnderTest]:
    async with make_gateway(ray_serve_fraction=0.0) as gateway:
        yield gateway


@pytest.fixture
async def sluice(gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Sluice]:
    """Runs a command in a thread while the gateway answers in this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.out, "width", 200)  # its width is as it was when it was imported
    async with listening(gateway.app) as port:
        environment = {"SLUICE_TOKEN": gateway.token("ops admin", subject="ann")}

        async def run(*words: str) -> Result:
            url = [] if "plan" in words else ["--url", f"http://127.0.0.1:{port}"]
            return await asyncio.to_thread(CliRunner().invoke, cli, [*words, *url], env=environment)

        yield run


async def test_a_share_is_set_and_shown_with_who_set_it_and_why(sluice: Sluice) -> None:
    assert (await sluice("rollout", "set", "0.05", "--reason", "first few")).exit_code == 0
    shown = (await sluice("rollout", "show")).stdout
    assert all(words in shown for words in ("ray_serve 5.00%", "legacy 95.00%", "ann on ", "first few"))


async def test_an_account_has_a_share_of_its_own_until_it_is_cleared(sluice: Sluice) -> None:
    assert "tenant:acme 100.00%" in (await sluice("rollout", "set", "1", "--account", "tenant:acme")).stdout
    document = json.loads((await sluice("rollout", "show", "--json")).stdout)
    assert (document["share"], document["overrides"]) == (0.0, {"tenant:acme": 1.0})
    assert "acme" not in (await sluice("rollout", "set", "--account", "tenant:acme", "--clear")).stdout


@pytest.mark.parametrize(
    "words", [(), ("nan",), ("0.5", "--clear"), ("--clear",), ("--clear", "--canary", "--account", "tenant:a"), ("2",)]
)
async def test_a_share_that_says_nothing_or_two_things_is_a_fault_of_usage(
    sluice: Sluice, words: tuple[str, ...]
) -> None:
    assert (await sluice("rollout", "set", *words)).exit_code == 2


async def test_a_plan_is_started_held_moved_and_rolled_back(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(SLOW_PLAN)
    shown = (await sluice("rollout", "start", "plan.toml")).stdout
    assert all(
        words in shown for words in ("slow", "step 1 of 2, running", "of 3600 s", "0 of 40 samples, then by hand")
    )
    assert "paused" in (await sluice("rollout", "pause")).stdout
    assert "running" in (await sluice("rollout", "resume")).stdout
    assert "step 2 of 2" in (await sluice("rollout", "promote")).stdout
    shown = (await sluice("rollout", "rollback", "--reason", "not today")).stdout
    assert all(words in shown for words in ("rolled back", "ray_serve 0.00%", "not today"))


async def test_rollback_is_a_command_of_its_own_too(sluice: Sluice) -> None:
    await sluice("rollout", "set", "0.5")
    document = json.loads((await sluice("rollback", "--to", "legacy", "--json")).stdout)
    assert (document["share"], document["stable"]) == (0.0, "legacy")


async def test_what_the_gateway_refuses_is_one_plain_line(sluice: Sluice) -> None:
    result = await sluice("rollout", "promote")
    assert result.exit_code == 1
    assert result.stderr.startswith("sluice: 409 ")
    assert result.stderr.count("\n") == 1


async def test_every_fault_of_a_plan_is_a_line_and_nothing_is_sent(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('nme = "x"\n[[steps]]\nshare = 2\n')
    result = await sluice("rollout", "start", "bad.toml")
    assert result.exit_code == EX_CONFIG
    lines = result.stderr.splitlines()
    assert any("steps.0.share" in line for line in lines)
    assert any("nme" in line for line in lines)
    assert all(line.startswith("sluice: bad.toml: ") for line in lines)
    assert json.loads((await sluice("rollout", "show", "--json")).stdout)["run"] is None


@pytest.mark.parametrize("content", [b"steps = ", b"\xff", b"#" * 20_000, None])
async def test_a_file_that_is_no_plan_is_one_plain_line(sluice: Sluice, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "plan.toml").write_bytes(content)
    result = await sluice("rollout", "start", "plan.toml")
    assert result.exit_code == EX_CONFIG
    assert result.stderr.startswith("sluice: plan.toml: ")
    assert result.stderr.count("\n") == 1


async def test_the_printed_plan_is_the_default_one_in_both_formats(sluice: Sluice) -> None:
    assert Plan.model_validate(tomllib.loads((await sluice("rollout", "plan")).stdout)) == Plan()
    assert Plan.model_validate(json.loads((await sluice("rollout", "plan", "--json")).stdout)) == Plan()


OURS = ["cnn_lstm_predictor", "cnn_lstm_predictor-4"]


@pytest.mark.parametrize(
    ("stable", "canary", "idle"),
    [
        ("legacy", "ray_serve", OURS),
        ("ray_serve", "ray_serve@4", OURS[1:]),
        ("ray_serve@4", "ray_serve", []),
        ("ray_serve", "legacy", []),
    ],
)
def test_only_applications_of_ours_that_serve_nobody_are_deleted(stable: str, canary: str, idle: list[str]) -> None:
    document = {"stable": stable, "canary": canary, "backends": ["legacy", "ray_serve"]}
    assert idle_applications(document, OURS) == idle


def test_without_legacy_no_application_is_idle_where_it_should_serve() -> None:
    assert idle_applications({"stable": "legacy", "canary": "ray_serve", "backends": ["ray_serve"]}, OURS) == []


def test_applications_are_ours_by_name_and_by_what_they_run() -> None:
    named = ["theirs", "cnn_lstm", "cnn_lstm_predictors", *OURS]
    config = {name: {"import_path": IMPORT_PATH} for name in named}
    assert our_applications(config) == OURS
    config[OURS[1]] = {"import_path": "their.dashboard:app"}
    assert our_applications(config) == OURS[:1]


class Cluster:
    """Stands for Ray's dashboard: what it serves, and what of it is deleted."""

    deleted: list[str]
    stubborn: list[str]

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None: ...

    def instance(self) -> dict[str, Any]:
        config = {"import_path": IMPORT_PATH}
        return {"applications": {name: {"deployed_app_config": config} for name in ["theirs", *OURS]}}

    def delete(self, names: list[str]) -> None:
        type(self).deleted += names

    def wait_gone(self, names: list[str], **_: object) -> list[str]:
        return [name for name in names if name in type(self).stubborn]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> type[Cluster]:
    monkeypatch.setattr("app.serve_api.ServeApi", Cluster)
    monkeypatch.setattr("app.cli.rollout._SEEN_EVERYWHERE_S", 0.0)
    Cluster.deleted, Cluster.stubborn = [], []
    return Cluster


async def test_our_applications_are_deleted_only_when_that_is_said_twice(
    sluice: Sluice, cluster: type[Cluster]
) -> None:
    assert (await sluice("rollback")).exit_code == 0
    result = await sluice("rollback", "--delete")  # standard input is no terminal: nobody can be asked
    assert (result.exit_code, cluster.deleted) == (1, [])
    assert "nothing was deleted" in result.stderr
    result = await sluice("rollback", "--delete", "--yes")
    assert (result.exit_code, cluster.deleted) == (0, OURS)
    assert result.stderr == "cnn_lstm_predictor, cnn_lstm_predictor-4 deleted on Ray Serve; every other one stays\n"


async def test_what_is_not_gone_in_time_is_told(sluice: Sluice, cluster: type[Cluster]) -> None:
    cluster.stubborn = OURS[1:]
    result = await sluice("rollback", "--delete", "--yes")
    assert result.exit_code == 1
    assert "Ray Serve is still deleting cnn_lstm_predictor-4 after" in result.stderr


async def test_nothing_is_deleted_where_the_share_could_not_be_taken_back(
    sluice: Sluice, cluster: type[Cluster]
) -> None:
    assert (await sluice("rollback", "--delete", "--yes", "--token", "nobody")).exit_code == 1
    assert cluster.deleted == []
