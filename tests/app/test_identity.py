from __future__ import annotations

import time

import pytest

from app.errors import TooManyFailures, Unauthenticated
from app.identity import Identity, build_identity
from app.observability.ledger import Ledger
from app.settings import Settings


def identity_of(settings: Settings) -> Identity:
    return build_identity(
        settings,
        count_failure=lambda _: None,
        count_reload=lambda *_: None,
        clock=lambda: 0.0,
        wall_clock=time.time,
    )


@pytest.mark.parametrize(("workers", "per_minute", "each"), [(1, 10, 10), (2, 10, 5), (4, 10, 2), (16, 10, 1)])
async def test_failures_that_an_address_may_make_are_shared_by_the_workers(
    settings: Settings, workers: int, per_minute: int, each: int
) -> None:
    changed = settings.with_overrides(redis_url="redis://cache", workers=workers, auth_failures_per_min=per_minute)
    door = identity_of(changed).door
    refusals: list[type[Exception]] = []
    for _ in range(12):
        scope = {"type": "http", "headers": [(b"authorization", b"Bearer x")], "client": ("192.0.2.1", 1)}
        Ledger(lambda: 0.0).open(scope)
        with pytest.raises((Unauthenticated, TooManyFailures)) as caught:
            await door.admit(scope)
        refusals.append(caught.type)
    assert refusals == [Unauthenticated] * each + [TooManyFailures] * (12 - each)
