"""OpenVINO would report its use to its makers; here it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

# What runs when OpenVINO's reporting module is imported is recorded, whatever it then does.
CODE = """
import socket, os, sys
from pathlib import Path
connect, fork = socket.socket.connect, os.fork
def refuse(*_): raise SystemExit("OpenVINO reports itself")
socket.socket.connect = os.fork = refuse
from serve_app.engine import load_engine
from serve_app.registry import Registry
load_engine(Registry(Path("models")).load("cnn_lstm"), engine="openvino")
print(sys.modules["openvino_telemetry"], sorted(os.listdir(Path.home())))
"""


def test_loading_openvino_starts_no_process_and_leaves_no_file(tmp_path: Path) -> None:
    # It keeps a random id of the user in the home folder once it reports.
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "None []\n", result.stderr
