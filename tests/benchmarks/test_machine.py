"""Figures are told with the versions of what made them."""

from __future__ import annotations

from benchmarks.machine import describe_machine
from serve_app.engine import AUTO


def test_the_library_of_every_engine_is_told_with_its_version() -> None:
    versions = describe_machine()["versions"]
    assert {name: versions[name].split(".")[0].isdecimal() for name in AUTO} == dict.fromkeys(AUTO, True)
