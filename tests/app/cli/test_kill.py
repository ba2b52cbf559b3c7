"""`sluice kill` against a gateway that listens, over fake backends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import cli, terminal
from tests.app.test_over_sockets import listening
from tests.app.under_test import GatewayUnderTest, MakeGateway

Sluice = Callable[..., Any]


@pytest.fixture
async def gateway(make_gateway: MakeGateway) -> AsyncIterator[GatewayUnderTest]:
    async with make_gateway() as gateway:
        yield gateway


@pytest.fixture
async def sluice(gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Sluice]:
    """Runs a command in a thread while the gateway answers in this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.out, "width", 200)
    async with listening(gateway.app) as port:
        environment = {"SLUICE_TOKEN": gateway.token("ops admin", subject="ann")}

        async def run(*words: str) -> Result:
            where = ["--url", f"http://127.0.0.1:{port}"]
            return await asyncio.to_thread(CliRunner().invoke, cli, ["kill", *words, *where], env=environment)

        yield run


async def test_predictions_are_refused_until_that_is_lifted(sluice: Sluice, gateway: GatewayUnderTest) -> None:
    assert "killed global in" in (await sluice("--global", "--reason", "prices are [wrong]")).stdout
    assert (await gateway.predict()).status_code == 503
    shown = (await sluice("--list")).stdout
    assert all(word in shown for word in ("global", "ann", "prices are [wrong]"))
    assert "lifted global in" in (await sluice("--global", "--lift")).stdout
    assert (await gateway.predict()).status_code == 200
    assert "nothing is killed" in (await sluice("--list")).stdout


@pytest.mark.parametrize(
    ("scope", "name"),
    [("model", "cnn_lstm"), ("principal", "tenant:fund-a"), ("principal", "sub:x"), ("symbol", "MSFT")],
)
async def test_each_scope_is_killed_by_its_name(sluice: Sluice, scope: str, name: str) -> None:
    assert (await sluice(f"--{scope}", name, "--reason", "why")).exit_code == 0
    [entry] = json.loads((await sluice("--list", "--json")).stdout)["killed"]
    assert {key: entry[key] for key in ("scope", "name", "actor", "reason")} == {
        "scope": scope,
        "name": name,
        "actor": "ann",
        "reason": "why",
    }


@pytest.mark.parametrize(
    "words", [(), ("--global",), ("--global", "--symbol", "A", "--reason", "x"), ("--list", "--lift"), ("--lift",)]
)
async def test_what_names_nothing_or_two_things_or_no_reason_is_a_fault_of_usage(
    sluice: Sluice, words: tuple[str, ...]
) -> None:
    result = await sluice(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("sluice: ")
    assert "nothing is killed" in (await sluice("--list")).stdout


async def test_a_name_that_nothing_can_have_is_refused_in_one_line(sluice: Sluice) -> None:
    result = await sluice("--symbol", "no such thing", "--reason", "x")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
