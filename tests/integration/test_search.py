"""The search on a real Ray: trials in its processes, failures shown, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.local_ray import LocalRay, descendants
from tests.integration.processes import ROOT, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# A driver of its own: Ray in this process would stay in it.
SEARCH = """
import json, sys
from pathlib import Path
from serve_app.model import ModelConfig
from serve_app.search import SPACE, Choice, SearchConfig, search
from serve_app.train import FitConfig, TrainConfig

fit = FitConfig(model=ModelConfig(channels=4, width=8, lstm_hidden=8, head_hidden=8), max_epochs=1)
told = []
searched = search(
    SearchConfig(
        TrainConfig(fit=fit, symbols=("IBM",), n_seeds=2),
        n_trials=3,
        space={"learning_rate": SPACE["learning_rate"], "width": Choice((3,))},
    ),
    ray_address=sys.argv[1],
    scratch=Path(sys.argv[2]),
    on_change=lambda trials: told.append([(trial.status, len(trial.losses)) for trial in trials]),
)
for name, data in searched.files.items():
    Path(name).write_bytes(data)
Path("told.json").write_text(json.dumps(told))
"""


def test_trials_run_on_ray_and_those_that_fail_are_shown_beside_the_others(
    ray_cluster: LocalRay, tmp_path: Path
) -> None:
    environment = {**os.environ, **ray_cluster.environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SEARCH, ray_cluster.address, str(tmp_path / "scratch")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "trials.json").read_text())
    baseline, *others = report["trials"]
    assert (baseline["status"], len(baseline["losses"])) == ("done", 2)
    assert baseline["candidate"] == {"learning_rate": 5e-4, "width": 8}
    assert [trial["status"] for trial in others] == ["failed", "failed"]
    assert all("attention_heads must divide width" in trial["error"] for trial in others)
    assert len({trial["candidate"]["learning_rate"] for trial in others}) == 2
    assert report["best"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["learning_rate"] == 5e-4
    assert "failed: ValueError: attention_heads" in (tmp_path / "SEARCH.md").read_text()
    assert any(["running", 1] in rows for rows in json.loads((tmp_path / "told.json").read_text()))


@pytest.mark.slow
def test_ctrl_c_leaves_neither_process_nor_file(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    before = set(Path("/tmp").glob("sluice-ray-*"))
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "train", "--search", "4"],
            cwd=own,
            env={**os.environ, "HOME": str(tmp_path)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    wait_until(lambda: any("ImplicitFunc" in name for name in names_below(process.pid)), 120, "a trial to run")
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(30) != 0
    print(f"ended {time.monotonic() - began:.1f} s after Ctrl-C")
    assert [pid for pid in family if Path(f"/proc/{pid}").exists()] == []
    assert list(own.iterdir()) == []
    fonts = {".cache", ".config"}  # matplotlib's list of them, which every training makes
    assert {path.name for path in tmp_path.iterdir()} - fonts == {"own", "output"}, "nothing else in the home folder"
    assert not [folder for folder in folders_since(before) if (folder / "tune").exists()]
    assert "Traceback" not in (tmp_path / "output").read_text()


def folders_since(before: set[Path]) -> set[Path]:
    """Folders of local Rays that are new; others' may be among them."""
    return set(Path("/tmp").glob("sluice-ray-*")) - before


def names_below(pid: int) -> list[str]:
    names = []
    for child in descendants(pid):
        try:
            names.append(Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return names
