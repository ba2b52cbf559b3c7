"""The short set: the faults that a change is likeliest to break, each as long as it takes to see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import report
from tests.faults.catalogue import SHORT
from tests.faults.laboratory import Laboratory
from tests.faults.scenario import Scenario, run
from tests.integration.processes import ROOT

LEDGERS = ROOT / ".bench" / "faults" / "short"

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with Laboratory() as lab:
        yield lab


@pytest.mark.parametrize("scenario", SHORT, ids=lambda scenario: scenario.name)
def test_the_promises_are_kept(scenario: Scenario, laboratory: Laboratory) -> None:
    row = run(scenario, laboratory, LEDGERS)
    print(report.line(row), f"({row.took_s:.0f} s)", *row.findings, sep="\n    ")
    assert row.kept, f"the ledger is {LEDGERS / scenario.name}.jsonl, the gateway's log beside it"
