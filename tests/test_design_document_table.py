"""Every name of ours in the table that maps the design document's names is one that exists."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from app.cli import cli
from app.main import create_app
from app.observability.metrics import Metrics
from app.settings import Settings, variable_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own code warns while it is imported

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "from-the-design-document.md"


def rows() -> list[tuple[str, str, str]]:
    """The cells of every row, without heads and rules."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in lines]  # type: ignore[misc]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


OURS = sorted({name for _, ours, _ in rows() for name in quoted(ours)})


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    settings = Settings.model_validate(
        {"jwt_secret": secrets.token_urlsafe(48), "state_dir": tmp_path_factory.mktemp("s")}
    )
    paths: dict[str, Any] = create_app(settings, backends=[]).openapi()["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def has(owner: Any, name: str) -> bool:
    """Whether an object has an attribute, a field or a key of that name."""
    if isinstance(owner, Mapping):
        return name in owner
    fields = {**getattr(owner, "model_fields", {}), **getattr(owner, "__dataclass_fields__", {})}
    return name in fields or hasattr(owner, name)


def resolves(reference: str) -> bool:
    """Whether `module:name.name` leads to something."""
    module, _, path = reference.partition(":")
    owner: Any = import_module(module)
    names = path.split(".")
    for name in names[:-1]:
        owner = getattr(owner, name)
    # Serve's decorator leaves the class inside.
    return has(owner, names[-1]) or has(getattr(owner, "func_or_class", None), names[-1])


def is_command(words: list[str]) -> bool:
    command: Any = typer.main.get_command(cli)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
    return command is not None


def is_ours(name: str, routes: set[str]) -> bool:
    if re.match(r"(GET|POST|PUT) /", name):
        return name in routes
    if name.startswith("sluice "):
        return is_command(name.split()[1:])
    if re.fullmatch(r"(app|serve_app)[\w.]*:[\w.]+", name):
        return resolves(name)
    if re.fullmatch(r"[A-Z_]+", name):
        return name in {variable_of(field) for field in Settings.model_fields}
    if name.startswith("cnn_lstm_"):
        return f"# TYPE {name} " in Metrics().exposition().decode()
    return (ROOT / name).is_file()


@pytest.mark.parametrize("name", OURS)
def test_a_name_of_ours_exists(name: str, routes: set[str]) -> None:
    assert is_ours(name, routes), f"{name} is in {TABLE.name} and nowhere else"


def test_rows_are_whole_and_say_what_is_missing() -> None:
    assert len(rows()) > 80
    for row in rows():
        assert len(row) == 3, row
        _, ours, difference = row
        assert ours or difference, f"{row[0]} is neither mapped nor explained"


@pytest.mark.parametrize(
    "name",
    [
        *("POST /nowhere", "sluice conquer", "app.main:nothing", "serve_app.autoscaling:PROFILES.none", "NO_SUCH"),
        *("app/no.py", "cnn_lstm_nothing_total"),
    ],
)
def test_a_name_that_is_not_there_is_noticed(name: str, routes: set[str]) -> None:
    assert not is_ours(name, routes)
