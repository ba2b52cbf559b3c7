"""The share that a plan's steps ask for, over 100,000 principals and the dispatcher that routes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from app.backends.base import Answer, Backend, Call
from app.backends.fake import FakeBackend, fake_prediction
from app.rollout import moves
from app.rollout.dispatch import Dispatcher
from app.rollout.evidence import Evidence
from app.rollout.moves import By
from app.rollout.plan import DEFAULT_STEPS, Plan
from app.rollout.record import Record
from serve_app.contract import N_FEATURES, N_STEPS, Options
from tests.app.rollout.rollouts import record_of

N = 100_000
SUBJECTS = [f"fund-{n % 97}/desk-{n}" for n in range(N)]
CALL = Call(np.zeros((1, N_FEATURES, N_STEPS), np.float32), Options(), 1e9, "request", "0" * 16)


class Constant(FakeBackend):
    """Answers at once and keeps nothing: there are many callers."""

    async def predict(self, call: Call) -> Answer:
        return ANSWER


ANSWER = Answer(fake_prediction(1), {})


def steps_of(plan: Plan) -> Iterator[Record]:
    """The record of each step, as a plan leads through them."""
    record = moves.start(record_of(0.0), plan, "run", By("ann", 0.0))
    yield record
    for at in range(1, len(plan.steps)):
        record = moves.promote(record, By("controller", float(at)))
        yield record


async def moved(record: Record, key: bytes) -> np.ndarray:
    """bool[N]: whom the canary answers."""
    backends: list[Backend] = [Constant("ray_serve"), Constant("legacy")]
    dispatcher = Dispatcher(backends, record=lambda: record, sticky_key=key, witness=Evidence())
    served = [await dispatcher.predict(CALL, subject=subject) for subject in SUBJECTS]
    return np.array([answer.arm.backend == "ray_serve" for answer in served])


async def test_each_step_has_its_share_of_100_000_principals_and_moves_nobody_back() -> None:
    so_far = np.zeros(N, bool)
    for record in steps_of(Plan()):
        now = await moved(record, b"k" * 32)
        share = record.share
        sigma = math.sqrt(N * share * (1 - share))
        off = int(now.sum()) - N * share
        print(f"\n{share:7.2%}: {now.sum():6d} of {N} principals, {off / sigma if sigma else 0.0:+.2f} sigma")
        assert abs(off) <= 4 * sigma
        assert not (so_far & ~now).any(), "somebody was moved back"
        so_far = now
    assert so_far.all()
    assert record.share == DEFAULT_STEPS[-1].share


async def test_another_key_moves_others() -> None:
    """Whoever is hit by one rollout is not the one who is hit by the next: the overlap is that of chance."""
    record = record_of(0.2)
    both = await moved(record, b"k" * 32) & await moved(record, b"l" * 32)
    expected = 0.2 * 0.2
    assert abs(both.sum() - N * expected) <= 4 * math.sqrt(N * expected * (1 - expected))
