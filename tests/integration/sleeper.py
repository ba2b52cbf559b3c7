"""How tests speak to `sleeper_app`, the real deployment with a model that only sleeps.

    windows[b, 0, 0]  milliseconds that the window takes
    windows[b, 0, 1]  its number, to be found again in `ran`; 0 leaves no trace

Sleeping takes no CPU, so a machine of any speed has the same capacity, and what is measured is what stands around it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from app.local_ray import LocalRay
from app.serve_api import ServeApi
from serve_app.contract import APP_NAME, N_FEATURES, N_STEPS
from tests.integration.processes import ROOT


def windows(*sleeps_ms: float, number: int = 0) -> bytes:
    """Raw float32[B,F,T] of windows that take so long, all with one number."""
    batch = np.zeros((len(sleeps_ms), N_FEATURES, N_STEPS), "<f4")
    batch[:, 0, 0] = sleeps_ms
    batch[:, 0, 1] = number
    return batch.tobytes()


def deploy(cluster: LocalRay, **limits: Any) -> None:
    """Put it where the gateway looks for the model; arguments are fields of `QueueLimits`."""
    application = {
        "name": APP_NAME,
        "route_prefix": None,
        "import_path": "tests.integration.sleeper_app:build",
        "args": limits,
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
    }
    with ServeApi(cluster.dashboard_url, token=cluster.token_file.read_text()) as api:
        api.put({"proxy_location": "Disabled", "applications": [application]})
        api.wait_running(APP_NAME, timeout_s=60, on_progress=lambda _: None, clock=time.monotonic)
