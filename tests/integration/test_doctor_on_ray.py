"""`sluice doctor` before a real cluster: it tells a token that is taken from one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.local_ray import LocalRay
from tests.integration.processes import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def doctor(folder: Path, cluster: LocalRay, token_file: Path) -> tuple[int, dict[str, str]]:
    environment = {
        **os.environ,
        **cluster.environment,
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ADDRESS": cluster.address,
        "GATEWAY_RAY_DASHBOARD_URL": cluster.dashboard_url,
        "GATEWAY_PORT": "0",
        "GATEWAY_JWT_SECRET_FILE": str(cluster.token_file),
        "MODEL_REGISTRY_PATH": str(ROOT / "models"),
    }
    command = [sys.executable, "-m", "app.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, {row["check"]: row["level"] for row in json.loads(done.stdout)}


def test_the_right_token_is_taken_and_the_wrong_one_named(ray_cluster: LocalRay, tmp_path: Path) -> None:
    status, levels = doctor(tmp_path, ray_cluster, ray_cluster.token_file)
    assert (status, levels["ray"], levels["ray token"]) == (0, "ok", "ok")
    assert levels["deployment"] in ("ok", "warn")  # whether another test has deployed by now

    wrong = tmp_path / "token"
    wrong.touch(mode=0o600)
    wrong.write_text("0" * 64)
    status, levels = doctor(tmp_path, ray_cluster, wrong)
    assert (status, levels["ray"], levels["deployment"], levels["ray token"]) == (1, "fail", "fail", "ok")
