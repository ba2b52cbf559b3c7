"""The kill switch over two real gateways, one of two workers, and a real Redis that goes and comes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from app.rollout.audit import verify
from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer
from tests.integration.two_gateways.gateways import PROMISED_S, Gateways, again_and_again

pytestmark = pytest.mark.integration


def kill(gateways: Gateways, gateway: GatewayProcess, scope: str, name: str = "", *, killed: bool = True) -> Any:
    response = gateways.say(gateway, "PUT", "/kill", scope=scope, name=name, killed=killed, reason="a test")
    assert response.status_code == 200, response.text
    return response.json()["reached"]


def test_within_a_second_no_worker_of_any_gateway_answers(gateways: Gateways) -> None:
    with (
        again_and_again(lambda: gateways.ask(gateways.one)) as at_one,
        again_and_again(lambda: gateways.ask(gateways.other)) as at_other,
    ):
        time.sleep(0.3)
        called_at = time.monotonic()
        reached = kill(gateways, gateways.one, "symbol", "MSFT")
        told_s = time.monotonic() - called_at
        time.sleep(1.3)
    assert reached == "all gateways"
    for name, answers in (("here, two workers", at_one), ("another gateway", at_other)):
        before = [at - called_at for at, status in answers if status == 200]
        after = [status for at, status in answers if at - called_at > PROMISED_S]
        print(f"\nkill switch, {name}: last answer {max(before):+.3f} s after the call (told after {told_s:.3f} s)")
        assert max(before) < PROMISED_S
        assert after
        assert set(after) == {503}
    assert gateways.all_say(gateways.one, 200, "AAPL")

    kill(gateways, gateways.other, "symbol", "MSFT", killed=False)
    time.sleep(PROMISED_S)
    assert gateways.all_say(gateways.one, 200)
    assert gateways.ask(gateways.other) == 200


def test_without_redis_a_kill_reaches_its_own_gateway_and_the_others_when_redis_is_back(
    gateways: Gateways, redis: RedisServer
) -> None:
    redis.kill()
    called_at = time.monotonic()
    with again_and_again(lambda: gateways.ask(gateways.one)) as answers:
        reached = kill(gateways, gateways.one, "global")
        time.sleep(1.2)
    assert reached == "this gateway: Redis is away"
    last_s = max([at - called_at for at, status in answers if status == 200], default=0.0)
    print(f"\nkill switch without Redis: last answer of two workers {last_s:+.3f} s after the call")
    assert last_s < PROMISED_S
    assert gateways.ask(gateways.other) == 200

    gateways.begin_again("one")
    assert gateways.all_say(gateways.one, 503)

    redis.start()  # and knows nothing
    started_at = time.monotonic()
    wait_until(lambda: gateways.ask(gateways.other) == 503, 10, "the other gateway to hear of it")
    print(f"kill switch: the other gateway refuses {time.monotonic() - started_at:.3f} s after Redis is back")

    assert kill(gateways, gateways.other, "global", killed=False) == "all gateways"
    time.sleep(PROMISED_S)
    assert gateways.all_say(gateways.one, 200)


def test_each_gateways_chain_is_whole_and_tells_of_the_others_changes(gateways: Gateways) -> None:
    kill(gateways, gateways.one, "symbol", "ONE")
    time.sleep(PROMISED_S)
    kill(gateways, gateways.other, "symbol", "ONE", killed=False)
    time.sleep(PROMISED_S)
    for name, actions in (("one", ["kill", "seen"]), ("other", ["seen", "lift"])):
        assert verify(gateways.audit_log(name)).records
        told = [record["action"] for record in gateways.records(name) if (record["to"] or {}).get("name") == "ONE"]
        assert told == actions  # once, whichever worker saw it
