"""The import rules of `pyproject.toml`: the tree keeps them, and each of them catches a breach."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BREACHES = {
    "the model side imports the gateway": ("serve_app/engine/base.py", "import app.errors"),
    "the request path imports torch": ("app/api/hot.py", "import torch"),
    "the gateway's side of the bridge imports ray": ("app/backends/ray_serve.py", "import ray"),
    "the model imports ray": ("serve_app/model.py", "from ray import serve"),
    "a route verifies tokens by itself": ("app/api/hot.py", "from jose import jwt"),
    "a limiter asks Redis by itself": ("app/rate_limit/shared.py", "import redis.asyncio"),
    "a backend imports the routes": ("app/backends/coalesce.py", "import app.api.hot"),
    "an engine imports another one's library": ("serve_app/engine/pytorch.py", "import onnxruntime"),
    "the table of engines imports an optional library": ("serve_app/engine/__init__.py", "import openvino"),
    "the routes import the engine": ("app/api/hot.py", "import serve_app.engine"),
    "the routes open the registry": ("app/api/ops.py", "import serve_app.registry"),
}


def environment_readings(source: str) -> list[int]:
    """Lines in which a variable is read; to hand the whole environment on, or set one for a child, is no reading."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="getenv")):
                lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "pop" | "setdefault")):
                lines.append(node.lineno)
            case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Load()):
                lines.append(node.lineno)
    return lines


def test_one_module_reads_the_environment() -> None:
    readers = {path.name for path in (ROOT / "app").rglob("*.py") if environment_readings(path.read_text())}
    assert readers == {"environment.py"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for package in ("app", "serve_app"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_tree_keeps_the_import_rules(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_caught(tree: Path, breach: str) -> None:
    file, line = BREACHES[breach]
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout
