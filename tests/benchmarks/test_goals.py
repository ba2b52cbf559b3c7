"""Goals are judged by medians and by ratios inside rounds."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.goals import Verdict, judge
from benchmarks.rounds import NOOP, SHIPPED, SMALL
from tests.benchmarks.results import results, row


def verdict(found: dict[str, Any], text: str) -> Verdict:
    return next(verdict for verdict in judge(found) if text in verdict.text)


def test_a_ratio_is_taken_inside_each_round_and_the_median_judged() -> None:
    ours, theirs = (800.0, 90.0, 1000.0), (100.0, 10.0, 200.0)  # 8, 9 and 5 times
    rows = [row(n, "sluice", NOOP, "json", rps) for n, rps in enumerate(ours)]
    rows += [row(n, "document_stack", NOOP, "json", rps) for n, rps in enumerate(theirs)]
    found = verdict(results(*rows), "JSON, over the design document's stack")
    assert found.measured == (8.0, 5.0, 9.0)
    assert found.word == "met"


def test_a_round_that_one_of_two_systems_missed_does_not_count() -> None:
    rows = [row(0, "sluice", NOOP, "json", 100), row(1, "sluice", NOOP, "json", 900)]
    rows += [{"round": 0, "system": "triton", "model": NOOP, "error": "not up"}, row(1, "triton", NOOP, "json", 300)]
    assert verdict(results(*rows), "JSON, over Triton").measured == (3.0, 3.0, 3.0)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert {found.word for found in judge(results())} == {"not measured"}


def test_the_best_python_peer_is_the_fastest_one_measured() -> None:
    rows = [row(0, "sluice", NOOP, "json", 100), row(0, "litserve", NOOP, "json", 20)]
    rows += [row(0, "mosec", NOOP, "json", 50), row(0, "mosec", NOOP, "json_orjson", 80)]
    found = results(*rows)
    assert verdict(found, "as it comes").measured == (2.0, 2.0, 2.0)
    assert verdict(found, "with orjson").measured == (1.25, 1.25, 1.25)
    assert verdict(found, "as it comes").note == "mosec, json"


def test_the_share_of_the_bare_engine_counts_windows_of_the_same_round() -> None:
    rows = [row(0, "sluice", SMALL, "binary", 100, windows=8)]
    bare = [{"round": 0, "model": SMALL, "batch": 32, "windows_per_s": 1000.0}]
    bare += [{"round": 0, "model": SMALL, "batch": 1, "windows_per_s": 1.0}]
    found = verdict(results(*rows, bare=bare), "share of the bare engine")
    assert found.measured == (0.8, 0.8, 0.8)
    assert found.is_met


def test_a_tail_is_met_from_below() -> None:
    ours = row(0, "sluice", SHIPPED, "binary", 1, latency_ms={"p50": 1.0, "p99": 30.0})
    theirs = row(0, "triton", SHIPPED, "binary", 1, latency_ms={"p50": 1.0, "p99": 20.0})
    text = "shipped, binary: p99 over Triton's, closed"
    assert verdict(results(ours, theirs), text).measured == (1.5, 1.5, 1.5)
    assert verdict(results(ours, theirs), text).word == "missed"
    assert verdict(results({**ours, "system": "triton"}, {**theirs, "system": "sluice"}), text).word == "met"


def test_failed_requests_meet_nothing() -> None:
    theirs = row(0, "triton", NOOP, "json", 1)
    ours = row(0, "sluice", NOOP, "json", 100, failed={"503": 2})
    found = verdict(results(ours, theirs), "JSON, over Triton")
    assert (found.word, found.failed) == ("missed", 2)


def test_the_gateways_cost_is_compared_from_one_connection_to_the_most() -> None:
    sweep = [{"connections": n, "cpu_ms": {"gateway": ms}} for n, ms in ((1, 0.5), (32, 9.0), (128, 0.2))]
    assert verdict(results(sweep=sweep), "CPU per request").measured == pytest.approx((0.4, 0.4, 0.4))
