from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Callable

import pytest

from app.rollout.webhook import Webhook
from app.secret_files import read_webhook_secret
from tests.app.rollout.receiver import Receiver

KEY = bytes(range(32))
SECRET = b"whsec_" + base64.b64encode(KEY)


async def outcomes_of(url: str, count: int = 1, **limits: float) -> list[str]:
    outcomes: list[str] = []

    async def pause(_: float) -> None:
        await asyncio.sleep(0.01)

    hook = Webhook(url, secret=lambda: SECRET, count=outcomes.append, sleep=pause, **limits)
    await hook.start()
    for n in range(count):
        hook.send({"type": "rollout.step", "data": {"n": n}})
    for _ in range(200):
        if len(outcomes) >= count:
            break
        await asyncio.sleep(0.01)
    await hook.stop()
    return outcomes


async def test_an_event_is_signed_over_its_id_time_and_body() -> None:
    async with Receiver(204) as receiver:
        assert await outcomes_of(receiver.url) == ["delivered"]
    [(headers, body)] = receiver.requests
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


@pytest.mark.parametrize("first", [500, 302, 404])
async def test_an_event_that_is_not_taken_is_sent_again_under_its_id(first: int) -> None:
    async with Receiver(first, 200) as receiver:
        assert await outcomes_of(receiver.url) == ["delivered"]
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len(receiver.requests) == 2


@pytest.mark.parametrize("status", [500, 0])
async def test_a_receiver_that_fails_or_hangs_is_given_up(status: int) -> None:
    async with Receiver(status) as receiver:
        assert await outcomes_of(receiver.url, attempt_timeout_s=0.05, event_timeout_s=0.2) == ["gave-up"]


async def test_a_receiver_that_is_away_or_gone_costs_its_event_alone() -> None:
    assert await outcomes_of("http://127.0.0.1:1/", event_timeout_s=0.1) == ["gave-up"]
    async with Receiver(410) as receiver:
        assert await outcomes_of(receiver.url) == ["gone"]


async def test_events_that_find_no_room_are_dropped_and_counted() -> None:
    async with Receiver(200) as receiver:
        outcomes = await outcomes_of(receiver.url, count=105)
    assert outcomes.count("queue-full") == 5


async def test_one_that_ends_while_an_event_still_waits_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def find_nothing(_: str, __: int) -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("app.rollout.webhook._FLUSH_S", 0.01)
    outcomes: list[str] = []
    before = asyncio.all_tasks()
    hook = Webhook("http://receiver/", secret=lambda: SECRET, count=outcomes.append, resolve=find_nothing)
    await hook.start()
    hook.send({"type": "rollout.step", "data": {}})
    await hook.stop()
    assert outcomes == ["stopped"]
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("text", [b"", b"whsec_", SECRET[6:], b"whsec_!!!!", b"whsec_" + base64.b64encode(b"short")])
def test_a_secret_of_another_form_is_refused(text: bytes) -> None:
    check: Callable[[bytes], bytes] = read_webhook_secret
    with pytest.raises(ValueError, match="whsec_"):
        check(text)
