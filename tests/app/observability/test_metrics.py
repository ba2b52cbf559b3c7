from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from app.observability.metrics import Metrics


def count(metrics: Metrics, version: str, n: int = 1) -> None:
    for _ in range(n):
        metrics.predictions.count_answer(
            version=version, arm="ray_serve", fallback=None, windows=2, seconds=0.03, stages_ms={"model": 20.0}
        )


def test_applications_in_one_process_do_not_share_metrics() -> None:
    first, second = Metrics(), Metrics()
    count(first, "1")
    assert b'requests_total{model_version="1"} 1.0' in first.exposition()
    assert b'model_version="1"' not in second.exposition()


def test_made_up_versions_and_reasons_are_bounded() -> None:
    metrics = Metrics()
    for version in range(1000):
        count(metrics, f"v{version}")
        metrics.predictions.count_answer(
            version="1", arm="legacy", fallback=f"made-up-{version}", windows=1, seconds=0.0, stages_ms={}
        )
    text = metrics.exposition()
    assert text.count(b"cnn_lstm_prediction_requests_total{") <= 34
    assert text.count(b"gateway_fallbacks_total{") == 1


_WORKER = """
import sys
from pathlib import Path
from app.observability.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    metrics.predictions.count_answer(
        version="1", arm="ray_serve", fallback=None, windows=3, seconds=0.03, stages_ms={"model": 20.0}
    )
metrics.arms.show_replicas(int(sys.argv[2]), {})
metrics.rollout.show_record(int(sys.argv[2]) / 10, {"running": sys.argv[2] == "2", "done": sys.argv[2] == "5"})
sys.stdout.buffer.write(metrics.exposition())
"""


def test_metrics_of_several_workers_add_up(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for predictions in ("2", "5"):
        text = subprocess.run(
            [sys.executable, "-c", _WORKER, str(tmp_path), predictions],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
        ).stdout
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples['cnn_lstm_prediction_requests_total{model_version="1"}']) == 7
    assert float(samples['gateway_windows_total{arm="ray_serve"}']) == 21
    assert float(samples['cnn_lstm_prediction_latency_seconds_count{model_version="1"}']) == 7
    assert float(samples["cnn_lstm_replicas_total"]) == 5, json.dumps(samples)
    assert float(samples["gateway_rollout_share"]) == 0.5
    assert [float(samples[f'gateway_rollout_phase{{phase="{phase}"}}']) for phase in ("running", "done")] == [0, 1]


def test_a_fallback_is_told_of_whichever_arm_failed() -> None:
    [told] = [line for line in Metrics().exposition().decode().splitlines() if "HELP gateway_fallbacks_total" in line]
    assert not any(arm in told.lower() for arm in ("legacy", "ray"))


async def test_a_scrape_over_several_workers_leaves_the_event_loop_free(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    with (tmp_path / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        release = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        scraping = asyncio.create_task(metrics.scrape())
        await asyncio.sleep(0)
        assert not scraping.done()
        assert await scraping == metrics.exposition()
        release.join()
