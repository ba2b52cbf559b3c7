"""The figures and the verdict: what counts, and what never does."""

from __future__ import annotations

import io
import json

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from app.bench.load import OK, Outcome, Plan, Sample
from app.bench.picture import latency_picture
from app.bench.report import Report, describe_ms, histogram, render, summarise

DOCUMENTED = (
    "total_requests",
    "total_time_seconds",
    "average_latency_ms",
    "p95_latency_ms",
    "p99_latency_ms",
    "throughput_rps",
    "concurrency",
)


def sampled(*latencies_ms: float, failures: tuple[str, ...] = ()) -> list[Sample]:
    good = [Sample(0.01 * n, 0.0, ms / 1e3, Outcome(OK, "ray_serve")) for n, ms in enumerate(latencies_ms)]
    return good + [Sample(1.0, 0.0, 9.0, Outcome(code)) for code in failures]


def report(samples: list[Sample], *, rate_rps: float | None = None, total_time_s: float = 2.0) -> Report:
    plan = Plan(concurrency=7, rate_rps=rate_rps)
    window_times_s = np.array([0.001, 0.003])
    return summarise(
        samples,
        plan,
        total_time_s,
        target="http",
        body="binary",
        windows_per_request=1,
        window_times_s=window_times_s,
    )


def test_the_documents_seven_fields_are_there() -> None:
    found = report(sampled(*range(1, 101))).to_dict()
    assert [found[name] for name in DOCUMENTED] == pytest.approx([100, 2.0, 50.5, 95.05, 99.01, 50.0, 7])
    assert found["window_from_bars_ms"]["average"] == pytest.approx(2.0)
    json.dumps(found, allow_nan=False)


def test_failures_are_neither_throughput_nor_latency_but_errors_by_kind() -> None:
    found = report(sampled(10, 20, failures=("503", "timeout", "503"))).to_dict()
    assert (found["total_requests"], found["succeeded"]) == (5, 2)
    assert found["throughput_rps"] == 1.0
    assert found["average_latency_ms"] == pytest.approx(15.0)
    assert found["errors"] == {"503": 2, "timeout": 1}
    assert found["served_by"] == {"ray_serve": 2}


@pytest.mark.parametrize(
    ("samples", "meets"),
    [
        (sampled(*[10] * 100), True),
        (sampled(*[10] * 100, failures=("503",)), False),
        (sampled(*[10] * 98, 101, 101), False),  # p99 alone is over
        (sampled(*[10] * 999, 5000), True),  # one in a thousand is beyond what was asked for
        (sampled(*[100] * 100), False),  # under 100 ms, not at it
        (sampled(failures=("timeout",)), False),
        ([], False),
    ],
)
def test_only_quick_answers_without_a_failure_pass(samples: list[Sample], meets: bool) -> None:
    assert report(samples).meets_requirements is meets


def test_when_nothing_succeeds_there_are_no_latencies_and_no_crash() -> None:
    nothing = report(sampled(failures=("connection",)))
    assert set(nothing.latency_ms.values()) == {None}
    assert nothing.throughput_rps == 0
    assert printed(nothing, [])[-1] == "Meets Requirements: False"


def test_the_last_line_is_the_verdict_and_errors_stand_above_it() -> None:
    samples = sampled(10, 20, failures=("503",))
    lines = printed(report(samples, rate_rps=50), samples)
    assert lines[-1] == "Meets Requirements: False"
    assert any("failed: 503: 1" in line for line in lines)
    assert any("open loop, 50 requests/s due" in line for line in lines)
    assert any(line.strip().startswith("sent late ") for line in lines)


def test_percentiles_reach_into_the_tail() -> None:
    figures = describe_ms(np.arange(10_001) / 1e6)
    assert figures["p99.9"] == pytest.approx(9.99)
    assert figures["max"] == pytest.approx(10.0)


@pytest.mark.parametrize("latencies", [[3.0], [1.0, 1.0, 1.0], list(np.geomspace(0.1, 900, 250))])
def test_the_histogram_holds_every_latency(latencies: list[float]) -> None:
    lines = histogram(latencies)
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == len(latencies)
    assert max(line.count("█") for line in lines) == 40


@pytest.mark.parametrize("failures", [(), ("503",) * 20])
def test_the_picture_shows_failures_in_red_and_only_those(failures: tuple[str, ...]) -> None:
    samples = sampled(*np.linspace(2, 50, 60), failures=failures)
    pixels = matplotlib.image.imread(io.BytesIO(latency_picture(report(samples), samples)))[..., :3]
    is_red = (pixels[..., 0] > 0.6) & (pixels[..., 1] < 0.4) & (pixels[..., 2] < 0.4)
    assert is_red.any() == bool(failures)


def test_a_picture_of_nothing_is_still_a_picture() -> None:
    assert latency_picture(report([]), []).startswith(b"\x89PNG")


def printed(found: Report, samples: list[Sample]) -> list[str]:
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(render(found, samples))
    return [line.rstrip() for line in console.export_text().splitlines()]
