"""What the page for operators shows is what the code takes: its plan, every command, setting, metric and action."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from app.cli import cli
from app.observability.metrics import Metrics
from app.rollout.audit import ACTIONS
from app.rollout.plan import DEFAULT_GUARDS, ArmName, Freeze, Guard, Plan, Signal, Step
from app.settings import Settings, variable_of

PAGE = (Path(__file__).parents[1] / "docs" / "rollout.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))


def example() -> dict[str, Any]:
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    return tomllib.loads(text)


def test_the_example_is_a_plan() -> None:
    plan = Plan.model_validate(example())

    assert [step.share for step in plan.steps] == [0.01, 0.25, 1.0]
    assert str(plan.canary.arm()) == "ray_serve@4"


def test_the_first_guards_of_the_example_are_the_default_ones() -> None:
    assert Plan.model_validate(example()).guards[: len(DEFAULT_GUARDS)] == DEFAULT_GUARDS


@pytest.mark.parametrize(
    ("model", "tables"),
    [
        (Plan, [example()]),
        (ArmName, [example()["canary"]]),
        (Step, example()["steps"]),
        (Guard, example()["guards"]),
        (Freeze, example()["freezes"]),
    ],
)
def test_the_example_shows_every_field(model: type[BaseModel], tables: list[dict[str, Any]]) -> None:
    assert {name for table in tables for name in table} == set(model.model_fields)


def test_the_example_has_a_guard_on_every_signal() -> None:
    assert {guard["signal"] for guard in example()["guards"]} == set(get_args(Signal))


def test_the_page_names_every_action_of_the_audit_log_and_no_other() -> None:
    named = set(re.findall(r"`([a-z]+)`", SECTIONS["Audit log"])) - {"verify"}

    assert named == ACTIONS


def test_settings_and_metrics_of_the_page_exist() -> None:
    known = {variable_of(field) for field in Settings.model_fields}
    shown = Metrics().exposition().decode()

    assert set(re.findall(r"\bGATEWAY_[A-Z_]+", PAGE)) <= known
    assert [name for name in re.findall(r"\bgateway_[a-z_]+", PAGE) if f"# TYPE {name} " not in shown] == []


def test_commands_of_the_page_exist() -> None:
    lines = set(re.findall(r"(?:^    |`|\$\()sluice ([a-z]+(?: [a-z]+)?)", PAGE, re.MULTILINE))

    assert len(lines) > 10
    assert [line for line in lines if not is_command(line.split())] == []


def is_command(words: list[str]) -> bool:
    """Whether the words name a command, all of them or those before its arguments."""
    command: Any = typer.main.get_command(cli)
    for word in words:
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            return True
        command = subcommands.get(word)
    return command is not None
