from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from app.api.outcomes import MAX_OUTCOMES
from app.backends.base import Answer, Arm
from app.backends.fake import fake_prediction
from app.errors import PROBLEM_JSON
from app.rollout.dispatch import Served
from app.rollout.experiment_log import FILE_NAME
from tests.app.under_test import NOW, GatewayUnderTest

ID = "0123456789abcdef" * 2
OTHER_ID = "f" * 32
NOTHING = {"accepted": 0, "unknown": 0, "duplicate": 0}


def log_requests(gateway: GatewayUnderTest, *request_ids: str, n: int = 2) -> None:
    """As if an experiment had run."""
    experiment = gateway.app.state.gateway.experiment
    for request_id in request_ids:
        served = Served(Answer(fake_prediction(n, version="4")), Arm("ray_serve"))
        experiment.record(request_id, "p" * 16, "canary", served)
    experiment.write()


async def tell(gateway: GatewayUnderTest, outcomes: Any, scopes: str = "admin") -> Any:
    return await gateway.client.post("/rollout/outcomes", json=outcomes, headers=gateway.bearer(scopes))


async def labelled(gateway: GatewayUnderTest, query: str = "") -> int:
    response = await gateway.client.get(f"/rollout/report{query}", headers=gateway.bearer("ops"))
    assert response.status_code == 200, response.text
    return sum(arm["measures"]["labelled"] for arm in response.json()["arms"])


async def test_outcomes_are_joined_with_what_was_answered(gateway: GatewayUnderTest) -> None:
    log_requests(gateway, ID)
    outcomes = [
        {"request_id": ID, "window": 0, "class": 0, "return": -0.7},
        {"request_id": ID, "window": 1, "class": 2},
        {"request_id": OTHER_ID, "window": 0, "return": 0.1},
    ]
    response = await tell(gateway, outcomes)
    assert (response.status_code, response.json()) == (200, {**NOTHING, "accepted": 2, "unknown": 1})
    assert (await tell(gateway, outcomes)).json() == {**NOTHING, "duplicate": 2, "unknown": 1}
    report = (await gateway.client.get("/rollout/report", headers=gateway.bearer("ops"))).json()
    (arm,) = report["arms"]
    assert (arm["side"], arm["arm"]) == ("canary", "ray_serve@4")
    measures = arm["measures"]
    assert (measures["requests"], measures["labelled"], measures["callers"]) == (1, 2, 1)
    assert (measures["hit_rate"]["value"], measures["hit_rate"]["n"]) == (0.5, 2)
    assert measures["coverage_90"]["n"] == 1


async def test_a_gateway_that_has_logged_nothing_says_so(gateway: GatewayUnderTest) -> None:
    assert (await tell(gateway, [{"request_id": ID, "class": 1}])).json() == {**NOTHING, "unknown": 1}
    assert await labelled(gateway) == 0


async def test_requests_before_since_do_not_count(gateway: GatewayUnderTest) -> None:
    log_requests(gateway, ID)
    await tell(gateway, [{"request_id": ID, "class": 1}])
    assert await labelled(gateway, f"?since={NOW - 1}") == 1
    assert await labelled(gateway, f"?since={NOW + 1}") == 0


async def test_a_thousand_outcomes_fit_and_one_more_does_not(gateway: GatewayUnderTest) -> None:
    outcome = {"request_id": ID, "window": 1023, "class": 2, "return": -123456.78901234567}
    assert (await tell(gateway, [outcome] * MAX_OUTCOMES)).json()["unknown"] == MAX_OUTCOMES
    assert (await tell(gateway, [outcome] * (MAX_OUTCOMES + 1))).status_code == 422


GOOD = f'{{"request_id": "{ID}", "class": 1}}'


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ('{"request_id": "ID"}', 422),
        ('{"request_id": "ID", "class": null, "return": null}', 422),
        ('{"request_id": "ID", "class": 3}', 422),
        ('{"request_id": "ID", "class": -1}', 422),
        ('{"request_id": "ID", "class": 1.0}', 422),
        ('{"request_id": "ID", "class": true}', 422),
        ('{"request_id": "ID", "class": "up"}', 422),
        ('{"request_id": "ID", "return": "1"}', 422),
        ('{"request_id": "ID", "return": 1e7}', 422),
        ('{"request_id": "ID", "return": NaN}', 400),
        ('{"request_id": "ID", "return": 1e999}', 400),
        ('{"request_id": "ID", "class": 1, "window": -1}', 422),
        ('{"request_id": "ID", "class": 1, "window": 1024}', 422),
        ('{"request_id": "ID", "class": 1, "qx-mark": 1}', 422),
        ('{"request_id": "ID", "class": 1, "class": 2}', 400),
        ('{"request_id": "qx-mark", "class": 1}', 422),
        ('{"request_id": 7, "class": 1}', 422),
        ('{"class": 1}', 422),
        ("[]", 422),
        ("null", 422),
        ("[" * 9 + "]" * 9, 400),
    ],
)
async def test_one_bad_outcome_is_refused_and_none_is_stored(gateway: GatewayUnderTest, bad: str, status: int) -> None:
    log_requests(gateway, ID)
    body = f"[{GOOD}, {bad.replace('ID', ID, 1) if chr(34) + 'ID' + chr(34) in bad else bad}]"
    headers = {"Content-Type": "application/json", **gateway.bearer("admin")}
    response = await gateway.client.post("/rollout/outcomes", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    assert len(response.content) <= 4096
    assert "qx-mark" not in response.text
    assert await labelled(gateway) == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"[", 400), (b"[]", 422), (b"{}", 422), (b'"text"', 422), (b"[" * 4000, 400), (b" " * 262_145, 413)],
)
async def test_a_body_that_is_no_list_of_outcomes_is_refused(
    gateway: GatewayUnderTest, body: bytes, status: int
) -> None:
    headers = {"Content-Type": "application/json", **gateway.bearer("admin")}
    response = await gateway.client.post("/rollout/outcomes", content=body, headers=headers)
    assert response.status_code == status, response.text


async def test_another_type_or_encoding_is_415(gateway: GatewayUnderTest) -> None:
    for headers in ({}, {"Content-Type": "application/json", "Content-Encoding": "gzip"}):
        response = await gateway.client.post(
            "/rollout/outcomes", content=f"[{GOOD}]", headers={**headers, **gateway.bearer("admin")}
        )
        assert response.status_code == 415


async def test_a_log_that_cannot_be_used_is_503_and_tells_nothing_of_the_inside(gateway: GatewayUnderTest) -> None:
    log_requests(gateway, ID)
    other = sqlite3.connect(gateway.settings.state_dir / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    response = await tell(gateway, [{"request_id": ID, "class": 1}])
    other.close()
    assert response.status_code == 503
    assert response.headers["content-type"] == PROBLEM_JSON
    assert "locked" not in response.text
    assert "sqlite" not in response.text.lower()
    assert (await tell(gateway, [{"request_id": ID, "class": 1}])).json()["accepted"] == 1
