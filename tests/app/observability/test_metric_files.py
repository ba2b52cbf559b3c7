from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

from app.observability.metric_files import forget_worker, read_metrics

_WORKER = """
import os, sys
from pathlib import Path
from app.backends.breaker import State
from app.observability.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
metrics.predictions.count_answer(
    version="1", arm="legacy", fallback=None, windows=3, seconds=0.03, stages_ms={"model": 20.0}
)
metrics.access.show_limits_local(sys.argv[2] == "ill")
metrics.arms.show_breaker("legacy", State.OPEN if sys.argv[2] == "ill" else State.CLOSED, "unavailable")
metrics.arms.show_replicas(7 if sys.argv[2] == "ill" else 2, {})
print(os.getpid())
"""


def run_worker(folder: Path, health: str) -> int:
    """A worker that counts one prediction and ends; its process id."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", _WORKER, str(folder), health]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def samples(folder: Path) -> dict[str, float]:
    lines = [line for line in read_metrics(folder).decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_what_a_dead_worker_showed_goes_and_what_it_counted_stays(tmp_path: Path) -> None:
    run_worker(tmp_path, "well")
    ill = run_worker(tmp_path, "ill")
    before = samples(tmp_path)
    forget_worker(tmp_path, ill)
    after = samples(tmp_path)
    shown = ("gateway_rate_limit_local", 'gateway_breaker_state{arm="legacy"}', "cnn_lstm_replicas_total")
    assert [before[name] for name in shown] == [1, 2, 7]
    assert [after[name] for name in shown] == [0, 0, 2]
    assert after['cnn_lstm_prediction_requests_total{model_version="1"}'] == 2
    assert after['cnn_lstm_prediction_latency_seconds_bucket{le="0.05",model_version="1"}'] == 2
    assert {name: value for name, value in before.items() if name not in shown} == {
        name: value for name, value in after.items() if name not in shown
    }


def test_files_stay_few_however_many_workers_come_and_go(tmp_path: Path) -> None:
    pids = [run_worker(tmp_path, "well") for _ in range(3)]
    for pid in pids:
        forget_worker(tmp_path, pid)
        forget_worker(tmp_path, pid)  # twice is once
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["counter_ended.db", "histogram_ended.db"]
    assert samples(tmp_path)['gateway_windows_total{arm="legacy"}'] == 9


def test_a_scrape_waits_until_a_worker_is_wholly_forgotten(tmp_path: Path) -> None:
    scrape = threading.Thread(target=read_metrics, args=(tmp_path,), daemon=True)
    with (tmp_path / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        scrape.start()
        scrape.join(0.05)
        assert scrape.is_alive()
    scrape.join(10)
    assert not scrape.is_alive()
