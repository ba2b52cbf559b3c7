"""The machine that figures were made on, and the versions of what was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import PEERS

_OURS = ("fastapi", "httptools", "numpy", "onnxruntime", "openvino", "orjson", "ray", "torch", "uvicorn", "uvloop")
_THEIRS = {"triton": "nvidia-pytriton", "litserve": "litserve", "bentoml": "bentoml", "mosec": "mosec"}
_ASK_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, load before, versions; plain values for JSON."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
        "commit": _commit(),
        "versions": {name: version(name) for name in _OURS},
        "peers": dict(_peer_versions(_THEIRS)),
        "started_at": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return told.stdout.strip() or "unknown"


def _peer_versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        if PEERS[name].is_installed:
            words = [str(PEERS[name].python), "-c", _ASK_VERSION, _THEIRS[name]]
            told = subprocess.run(words, capture_output=True, text=True, check=False)
            yield name, told.stdout.strip() or "unknown"
