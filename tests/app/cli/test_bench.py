"""`sluice bench` as a process: its exit code is the verdict, its standard output the figures."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.app.bench.scripted_server import ScriptedServer, answer, prediction, serving


async def bench(server: ScriptedServer, folder: Path, *words: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "RAY_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "bench", "--url", server.url, "--token", "t", *words),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_a_quick_service_passes_and_leaves_a_picture(tmp_path: Path) -> None:
    async with serving(lambda n: prediction()) as server:
        words = ("--requests", "40", "--concurrency", "4", "--json", "--picture", "latency.png")
        code, output, errors = await bench(server, tmp_path, *words)
    assert code == 0, errors
    found = json.loads(output)
    assert (found["total_requests"], found["concurrency"], found["meets_requirements"]) == (40, 4, True)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert len(server.requests) == 1 + 4 + 40, "one to see who is there, one per caller to warm up"


async def test_one_failure_fails_the_test_and_is_named(tmp_path: Path) -> None:
    async with serving(lambda n: answer(503, {}) if n == 80 else prediction()) as server:
        code, output, _ = await bench(server, tmp_path, "--rate", "200", "--requests", "30")
    assert code == 1
    assert "failed: 503: 1" in output
    assert output.splitlines()[-1] == "Meets Requirements: False"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--picture", "nowhere/latency.png"), "nowhere"),
        (("--target", "handle"), "RAY_ADDRESS"),
    ],
)
async def test_what_cannot_be_done_is_told_before_anything_is_asked(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    async with serving(lambda n: prediction()) as server:
        code, output, errors = await bench(server, tmp_path, *words)
        assert server.requests == []
    assert (code, output) == (78, "")
    assert errors.startswith("sluice: ")
    assert expected in errors
