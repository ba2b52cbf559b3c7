"""Whatever the command, a fault that an operator can mend is one plain line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.app.cli.command import SECRET, assert_one_plain_line, sluice


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("predict", "--symbol", "TSLA"), "MSFT"),
        (("predict", "--symbol", "MSFT", "--date", "soon"), "YYYY-MM-DD"),
        (("predict", "--symbol", "MSFT", "--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("rollout", "show", "--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("rollout", "show", "--url", "http://[::1"), "[::1"),
        (("rollout", "report", "--url", "http://[::1"), "[::1"),
        (("registry", "verify"), "registry"),
        (("token", "--sub", ""), "name"),
        (("rollout", "show", "--token", "☃"), "token"),
    ],
)
def test_what_an_operator_can_mend_is_one_plain_line(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    assert_one_plain_line(sluice(*words, cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET), 1, expected)


def test_help_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = "import sys, app.cli; sys.exit(bool({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0
    print(f"imported in {time.monotonic() - started:.2f} s")


def test_what_is_piped_is_not_folded() -> None:
    script = "from app.cli.terminal import out; out.print('word ' * 40)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert printed.stdout.count("\n") == 1
