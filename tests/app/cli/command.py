"""The command line as a process of its own, and what an operator sees of a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECRET = "vR3kQ0mZy8Tn5LwXc7HdFgJ2sBpEuA9iKoNqWxYz4Mh6"
EX_CONFIG = 78
MODELS = Path(__file__).parents[3] / "models"


def sluice(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *words],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_plain_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("sluice: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
