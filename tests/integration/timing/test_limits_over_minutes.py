"""Two workers, one Redis and twice the load that is allowed, for minutes: what is admitted, and how soon one is told.

With Redis the first minute admits the limit within 5 %. Then Redis hangs for good: any minute after that admits at most
1.05 of the limit, any that spans it at most twice; after three requests nobody waits noticeably longer than before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.open_loop import Offer, Plan, Result, Stream, percentile_ms
from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer
from tests.integration.sleeper import windows

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

LIMIT = 1200
RATE_RPS = 40
WITH_REDIS_S = 90.0
WITHOUT_REDIS_S = 125.0


def most_in_a_minute(results: Sequence[Result], since: float, until: float) -> int:
    """Most that was admitted in any 60 s between two moments."""
    moments = [result.due for result in results if result.status == 200]
    starts = [moment for moment in moments if since <= moment <= until - 60]
    return max(sum(start <= moment < start + 60 for moment in moments) for start in starts)


def p99_ms(results: Sequence[Result]) -> float:
    return percentile_ms((result.answer_s for result in results), 99)


def test_the_limit_holds_with_redis_and_without(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis:
        settings = {
            "GATEWAY_WORKERS": "2",
            "GATEWAY_ENGINE": "noop",
            "GATEWAY_RATE_LIMIT": str(LIMIT),
            "GATEWAY_RAY_SERVE_FRACTION": "0.0",
            "REDIS_URL": redis.url,
        }
        gateway = GatewayProcess(tmp_path, settings)
        try:
            gateway.wait_for("legacy")
            wait_until(lambda: len(gateway.worker_pids()) == 2, 30, "both workers")
            headers = {**gateway.headers("predict"), "Content-Type": "application/octet-stream"}
            body = windows(0.0).hex()
            stream = Stream("desk", gateway.port, "/ray-serve/predict", headers, RATE_RPS, body, fresh_share=0.25)
            offer = Offer(Plan([stream], WITH_REDIS_S + WITHOUT_REDIS_S))
            time.sleep(max(0.0, offer.began + WITH_REDIS_S - time.monotonic()))
            redis.hang()
            switch = time.monotonic()
            results = offer.finish().results
        finally:
            gateway.stop()

    assert {result.status for result in results} == {200, 429}
    before = [result for result in results if result.due < switch - 0.1]
    after = [result for result in results if result.due >= switch]
    report = {
        "limit": LIMIT,
        "in the first minute": sum(result.status == 200 for result in before if result.due < offer.began + 60),
        "most in a minute with Redis": most_in_a_minute(results, offer.began, switch),
        "most in one that spans its end": most_in_a_minute(results, switch - 60, switch + 60),
        "most in one without": most_in_a_minute(results, switch, results[-1].due),
        "p99 before, ms": round(p99_ms(before), 1),
        "p99 after, ms": round(p99_ms(after[3:]), 1),
        "longest after, ms": sorted((round(1e3 * result.answer_s) for result in after[:50]), reverse=True)[:5],
        "told by one worker alone, with Redis": sum("x-ratelimit-mode" in result.headers for result in before),
        "told by Redis, without it": sum("x-ratelimit-mode" not in result.headers for result in after),
    }
    print(report)
    assert report["in the first minute"] == pytest.approx(LIMIT, rel=0.05)
    assert report["most in a minute with Redis"] <= 1.05 * LIMIT
    assert report["most in one that spans its end"] <= 2 * LIMIT
    assert report["most in one without"] <= 1.05 * LIMIT
    assert p99_ms(after[3:]) <= p99_ms(before) + 5
