from __future__ import annotations

import pytest

from app.rollout.experiment_picture import report_picture
from app.rollout.experiment_report import report
from tests.app.rollout.test_experiment_report import cell


@pytest.mark.parametrize(("file_format", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_report_is_drawn(file_format: str, begins: bytes) -> None:
    document = report([cell("canary"), cell("canary", n=20, callers=1), cell()], 0.0, draws=20).document()
    assert report_picture(document, file_format).startswith(begins)


def test_an_empty_report_is_drawn_too() -> None:
    assert report_picture(report([], 0.0).document(), "png").startswith(b"\x89PNG")


def test_the_picture_names_the_arms_and_the_difference() -> None:
    picture = report_picture(report([cell("canary"), cell()], 0.0, draws=20).document(), "svg")
    assert b"canary@1" in picture
    assert b"callers as draws" in picture
