"""The buffered histogram shows what the library's own would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from app.observability.histogram import BufferedHistogram

BUCKETS = (0.001, 0.01, 0.1, 1.0)


def exposition(kind: type[Histogram], amounts: list[tuple[str, float]], *, read_between: bool) -> list[bytes]:
    registry = CollectorRegistry()
    histogram = kind("seconds", "of something", ["stage"], registry=registry, buckets=BUCKETS)
    for stage, amount in amounts:
        histogram.labels(stage).observe(amount)
        if read_between:
            generate_latest(registry)
    return [line for line in generate_latest(registry).splitlines() if b"_created" not in line and b"_sum" not in line]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(BUCKETS) | st.floats(0, 2, width=32)), max_size=600),
    st.booleans(),
)
def test_it_counts_like_the_library_whenever_it_is_read(amounts: list[tuple[str, float]], read_between: bool) -> None:
    short = amounts[:20] if read_between else amounts
    assert exposition(BufferedHistogram, short, read_between=read_between) == exposition(
        Histogram, short, read_between=False
    )


def test_the_sum_is_of_all_observations() -> None:
    registry = CollectorRegistry()
    histogram = BufferedHistogram("seconds", "of something", registry=registry, buckets=BUCKETS)
    for _ in range(1000):
        histogram.observe(0.25)
    assert registry.get_sample_value("seconds_sum") == 250.0
    assert registry.get_sample_value("seconds_count") == 1000
