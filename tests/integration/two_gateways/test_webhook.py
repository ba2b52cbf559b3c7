"""Real gateways tell a real receiver of what is changed, whatever the receiver does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import pytest

from tests.integration.processes import wait_until
from tests.integration.two_gateways.gateways import PROMISED_S, Gateways, Receiver

pytestmark = pytest.mark.integration

Attempt = tuple[dict[str, str], bytes, int]


def told(receiver: Receiver, why: str) -> list[Attempt]:
    """What was tried of events with this reason."""
    return [attempt for attempt in list(receiver.attempts) if event(attempt)["data"].get("why") == why]


def event(attempt: Attempt) -> dict[str, Any]:
    return dict(json.loads(attempt[1]))


def is_signed(attempt: Attempt, key: bytes) -> bool:
    """As a receiver checks it that knows Standard Webhooks and nothing of us."""
    headers, body, _ = attempt
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return (
        headers["webhook-signature"] == f"v1,{expected}" and abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    )


def change(gateways: Gateways, share: float, why: str) -> float:
    """Seconds that a change by hand took its operator."""
    began = time.monotonic()
    response = gateways.say(gateways.other, "PUT", "/rollout", share=share, reason=why)
    assert response.status_code == 200, response.text
    return time.monotonic() - began


def test_an_event_that_the_receiver_failed_to_take_comes_again_signed_under_the_same_id(
    gateways: Gateways, receiver: Receiver
) -> None:
    receiver.status = 500
    change(gateways, 0.25, "first fails")
    wait_until(lambda: bool(told(receiver, "first fails")), 10, "an attempt")
    receiver.status = 204
    wait_until(lambda: told(receiver, "first fails")[-1][2] == 204, 10, "the event to be taken")
    attempts = told(receiver, "first fails")
    assert all(is_signed(attempt, gateways.hook_key) for attempt in attempts)
    assert not is_signed(attempts[0], b"another key")
    assert len({attempt[0]["webhook-id"] for attempt in attempts}) == 1
    data = event(attempts[-1])["data"]
    assert (data["who"], data["before"]["share"], data["after"]["share"]) == ("desk", 0.0, 0.25)
    change(gateways, 0.0, "back")


def test_a_receiver_that_hangs_keeps_no_change_waiting_and_hears_of_all_of_them_in_order(
    gateways: Gateways, receiver: Receiver
) -> None:
    receiver.answers.clear()
    try:
        took_s = [change(gateways, share, f"hung {share}") for share in (0.1, 0.2, 0.3, 0.0)]
        assert gateways.all_say(gateways.other, 200)
    finally:
        receiver.answers.set()
    print(f"\nwhile the receiver hung, changes took {max(took_s):.3f} s at most")
    assert max(took_s) < PROMISED_S
    wait_until(lambda: bool(told(receiver, "hung 0.0")), 20, "the last event")
    heard = [event(attempt)["data"].get("why", "") for attempt in receiver.attempts if attempt[2] == 204]
    assert [why for why in dict.fromkeys(heard) if why.startswith("hung")] == [
        "hung 0.1",
        "hung 0.2",
        "hung 0.3",
        "hung 0.0",
    ]
