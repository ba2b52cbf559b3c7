from __future__ import annotations

from benchmarks.shadow import measure_round


async def test_a_round_shadows_its_share_and_no_more() -> None:
    without = await measure_round(0.0, 0.2, 50)
    shadowed = await measure_round(1.0, 0.2, 50)
    assert without.outcomes == {}
    assert 0 < sum(shadowed.outcomes.values()) <= 10
    assert min(without.p99_ms, shadowed.p99_ms) >= 2.0
