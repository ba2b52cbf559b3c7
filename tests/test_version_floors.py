"""Auditing by name finds nothing for packages that an index does not know: the floors are checked here, one by one."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = [
    line.partition("#")[0].strip() for line in Path(__file__).with_name("version_floors.txt").read_text().splitlines()
]
FLOORS = [line for line in LINES if line]
ONLY_WHERE_INSTALLED = {"pyjwt"}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_older_than_its_floor_is_installed(floor: str) -> None:
    if floor.startswith("!"):
        assert installed(floor.removeprefix("!")) is None
        return
    name, specifier = re.fullmatch(r"([A-Za-z0-9_.-]+?)([=>].*)", floor).groups()
    found = installed(name)
    assert found is not None or canonicalize_name(name) in ONLY_WHERE_INSTALLED, f"{name} is not installed"
    assert found is None or found in SpecifierSet(specifier), f"{name} {found}"


@pytest.mark.parametrize("floor", [floor for floor in FLOORS if not floor.startswith("!")])
def test_no_pin_is_below_its_floor(floor: str) -> None:
    name, specifier = re.fullmatch(r"([A-Za-z0-9_.-]+?)([=>].*)", floor).groups()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pin = {canonicalize_name(pinned): at for pinned, at in pins.items()}.get(canonicalize_name(name))
    assert pin is None or pin in SpecifierSet(specifier)
