import pytest

from serve_app.health import Health, Outcome, Status, combine, judge

NOW = 1000.0


def outcomes(*latencies_or_errors: float | str, newest_at: float = NOW) -> list[Outcome]:
    """One per second, the last at `newest_at`."""
    n = len(latencies_or_errors)
    rows = [(newest_at - (n - 1 - i), what) for i, what in enumerate(latencies_or_errors)]
    return [
        Outcome(at, at + 5e8, 0.5, what) if isinstance(what, str) else Outcome(at, at + 5e8, what) for at, what in rows
    ]


@pytest.mark.parametrize(
    ("recent", "status"),
    [
        ([], "unknown"),
        ([0.01], "healthy"),
        ([0.01, 0.01, 0.3], "healthy"),  # one slow answer is no trend
        ([0.2, 0.01, 0.3], "degraded"),
        ([0.01, "not-ready", 0.01], "degraded"),
        ([0.01, 0.01, "not-ready"], "degraded"),
        ([0.01, "not-ready", "not-ready"], "unhealthy"),
        (["not-ready"], "unhealthy"),
        (["not-ready", "not-ready", 0.01], "degraded"),
    ],
)
def test_status_follows_what_the_last_inferences_did(recent: list[float | str], status: Status) -> None:
    health = judge(outcomes(*recent), now=NOW)
    assert health.status == status
    assert health.is_healthy == (status == "healthy")


def test_latency_is_the_median_of_answers_and_failures_are_named() -> None:
    health = judge(outcomes(0.01, 0.03, "deadline-exceeded", 0.02), now=NOW)
    assert health == Health("degraded", latency_ms=20.0, last_check=NOW + 5e8, error="deadline-exceeded")


def test_old_outcomes_say_nothing() -> None:
    stale = outcomes(0.01, 0.01, newest_at=NOW - 31)
    assert judge(stale, now=NOW) == Health("unknown", last_check=NOW - 31 + 5e8)


@pytest.mark.parametrize(
    ("arms", "status"),
    [
        ([], "unknown"),
        (["healthy", "healthy"], "healthy"),
        (["healthy", "unhealthy"], "degraded"),
        (["degraded", "unhealthy"], "degraded"),
        (["healthy", "unknown"], "degraded"),
        (["unhealthy", "unhealthy"], "unhealthy"),
        (["unhealthy", "unknown"], "unhealthy"),
        (["unknown"], "unknown"),
    ],
)
def test_one_arm_that_answers_carries_the_service(arms: list[Status], status: Status) -> None:
    assert combine(Health(arm) for arm in arms).status == status


def test_the_whole_tells_its_fastest_arm_and_newest_check() -> None:
    rows = [
        Health("healthy", latency_ms=8.0, last_check=10.0),
        Health("unhealthy", latency_ms=1.0, last_check=12.0, error="not-ready"),
    ]
    assert combine(rows) == Health("degraded", latency_ms=8.0, last_check=12.0, error="not-ready")
