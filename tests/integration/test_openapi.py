"""Every route answers what OpenAPI says of it, whatever is asked: requests made by code from the document itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.integration.processes import GatewayProcess

pytestmark = pytest.mark.integration

CHECKS = [
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


def test_answers_are_those_of_the_document(start_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = start_gateway(
        GATEWAY_ENGINE="noop", GATEWAY_RATE_LIMIT="1000000000", GATEWAY_OPS_RATE_LIMIT="1000000000", RAY_ADDRESS=""
    )
    gateway.wait_for("legacy")
    api = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        ask(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), gateway.headers(), n_cases=6)
        with contextlib.suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
            ask(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), gateway.headers(), n_cases=12)


def ask(cases: st.SearchStrategy[Any], headers: dict[str, str], n_cases: int) -> None:
    @given(cases)
    @hypothesis_settings(
        max_examples=n_cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def hold(case: Any) -> None:
        case.call_and_validate(headers=headers, checks=CHECKS)

    hold()
