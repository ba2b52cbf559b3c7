"""When requests are due, what latency counts from, and when a load ends; time is moved by hand."""

from __future__ import annotations

import asyncio

import pytest

from app.bench.load import OK, UNSENT, Outcome, Plan, Sample, apply_load, warm_up


class Service:
    """Takes a while for each request, on a clock of its own; `sleep` moves that clock too."""

    name = "service"

    def __init__(self, takes_s: float = 0.0) -> None:
        self.now = 100.0
        self.asked: list[tuple[int, float]] = []
        self._takes_s = takes_s

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(self, number: int) -> Outcome:
        self.asked.append((number, self.now - 100.0))
        self.now += self._takes_s
        return Outcome(OK)


async def load(service: Service, plan: Plan) -> tuple[list[Sample], float]:
    samples: list[Sample] = []
    total_s = await apply_load(service, plan, samples, clock=service.clock, sleep=service.sleep)
    return samples, total_s


async def test_in_the_closed_loop_latency_is_the_service_alone() -> None:
    samples, total_s = await load(Service(takes_s=0.5), Plan(requests=4, concurrency=1))
    assert [sample.latency_s for sample in samples] == pytest.approx([0.5] * 4)
    assert [sample.due_s for sample in samples] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert total_s == pytest.approx(2.0)


async def test_in_the_open_loop_latency_counts_from_when_the_request_was_due() -> None:
    samples, _ = await load(Service(takes_s=0.5), Plan(requests=4, concurrency=1, rate_rps=10))
    assert [sample.due_s for sample in samples] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [sample.late_s for sample in samples] == pytest.approx([0.0, 0.4, 0.8, 1.2])
    assert [sample.latency_s for sample in samples] == pytest.approx([0.5, 0.9, 1.3, 1.7])


async def test_a_quick_service_is_not_asked_before_its_time() -> None:
    service = Service(takes_s=0.01)
    await load(service, Plan(requests=3, concurrency=1, rate_rps=10))
    assert service.asked == [(0, pytest.approx(0.0)), (1, pytest.approx(0.1)), (2, pytest.approx(0.2))]


async def test_what_is_later_than_the_limit_is_a_failure_and_is_not_sent() -> None:
    service = Service(takes_s=5.0)
    samples, _ = await load(service, Plan(requests=5, concurrency=1, rate_rps=1, timeout_s=5.5))
    assert [sample.outcome.code for sample in samples] == [OK, OK, UNSENT, UNSENT, UNSENT]
    assert [number for number, _ in service.asked] == [0, 1]


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        (Plan(requests=None, duration_s=1.0, concurrency=1), 4),
        (Plan(requests=2, duration_s=1.0, concurrency=1), 2),
        (Plan(requests=None, duration_s=1.0, concurrency=1, rate_rps=8), 8),
        (Plan(requests=9, duration_s=1.0, concurrency=3, rate_rps=8), 8),
    ],
)
async def test_a_load_ends_with_its_requests_or_its_duration(plan: Plan, count: int) -> None:
    samples, _ = await load(Service(takes_s=0.25), plan)
    assert len(samples) == count
    assert plan.expected in (None, count)


def test_a_load_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="duration"):
        Plan(requests=None)


class Counting(Service):
    """Counts how many are inside at once."""

    inside = most = 0

    async def ask(self, number: int) -> Outcome:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        return Outcome(OK)


async def test_as_many_ask_at_once_as_there_are_callers() -> None:
    service = Counting()
    samples, _ = await load(service, Plan(requests=50, concurrency=7))
    assert (service.most, len(samples)) == (7, 50)


async def test_warming_up_is_one_request_of_each_caller_and_leaves_no_sample() -> None:
    service = Service()
    await warm_up(service, Plan(concurrency=5))
    assert [number for number, _ in service.asked] == [0, 1, 2, 3, 4]
