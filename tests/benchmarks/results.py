"""Results as a run writes them, with figures of a test's choosing."""

from __future__ import annotations

from typing import Any


def row(round: int, system: str, model: str, lane: str, rps: float, **changed: Any) -> dict[str, Any]:
    windows = changed.get("windows", 1)
    return {
        "round": round,
        "system": system,
        "model": model,
        "lane": lane,
        "connections": 32,
        "windows": windows,
        "loop": "closed",
        "answered": 100,
        "failed": {},
        "answered_rps": rps,
        "windows_per_s": rps * windows,
        "latency_ms": {"p50": 1.0, "p99": 2.0, "max": 3.0},
        "cpu_ms": {"gateway": 0.5, "generator": 0.1},
        "foreign_cores": 0.1,
        "facts": {},
        **changed,
    }


def results(*rows: dict[str, Any], **others: Any) -> dict[str, Any]:
    machine = {
        "started_at": "2026-01-01",
        "commit": "abc",
        "cores": 2,
        "cpu": "a processor",
        "memory_gib": 8,
        "load_average_before": [0.1, 0.1, 0.1],
        "python": "3.11",
        "versions": {"ray": "2"},
        "peers": {"triton": "1"},
    }
    return {
        "machine": machine,
        "plan": {"rounds": 3},
        "titles": {"triton": "NVIDIA Triton"},
        "engines": {"shipped": "torch"},
        "rows": list(rows),
        "bare": [],
        "sweep": [],
        **others,
    }
