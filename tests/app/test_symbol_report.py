"""The table of `sluice predict`, where the answer leaves something open."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.symbol_report import ask, render


class Gateway:
    """Answers with what it is given."""

    def __init__(self, uncertainty: dict[str, Any] | None) -> None:
        self.uncertainty = uncertainty

    def predict(self, windows: Any) -> dict[str, Any]:
        return {
            "predictions": {"classification_probs": [[0.25, 0.5, 0.25]], "regression_pred": [0.1]},
            "uncertainty": self.uncertainty,
            "processing_time_ms": 3.0,
            "model_time_ms": 1.0,
            "model_name": None,
            "model_version": None,
            "backend": "legacy",
            "request_id": "r",
        }


@pytest.mark.parametrize(
    ("uncertainty", "interval_is_known"),
    [
        (None, False),
        ({"regression_uncertainty": [1.0], "aleatoric": None, "epistemic": None, "predictive_entropy": None}, True),
    ],
)
def test_what_a_remote_legacy_does_not_tell_is_shown_as_unknown(
    uncertainty: dict[str, Any] | None, interval_is_known: bool
) -> None:
    report = ask(Gateway(uncertainty), "MSFT", None, Path("models"))
    assert report["sample"] == "unknown"
    assert report["uncertainty_sd"] == {"aleatoric": None, "epistemic": None}
    assert (report["interval_90_pct"] is not None) is interval_is_known
    page = io.StringIO()
    Console(file=page, width=120).print(render(report))
    assert "aleatoric unknown, epistemic unknown" in page.getvalue()
    assert (" % to " in page.getvalue()) is interval_is_known
