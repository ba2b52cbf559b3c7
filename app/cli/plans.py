"""Plans as files: TOML or JSON, judged here before anything is sent."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app.cli.terminal import EX_CONFIG, err, fail

if TYPE_CHECKING:
    from pydantic import ValidationError

    from app.rollout.plan import Plan

_MAX_PLAN_BYTES = 16 * 1024  # what the gateway takes
_MAX_FAULTS = 10


def read_plan(path: Path | None) -> Plan:
    """The plan in a file, or the default one; every fault of it is a line, and ends the command."""
    from pydantic import ValidationError

    from app.rollout.plan import Plan

    if path is None:
        return Plan()
    document = _document(path)
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        _tell_faults(path, error)


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as the gateway takes it."""
    return plan.model_dump(mode="json", exclude_none=True)


def toml_of(document: dict[str, Any]) -> str:
    """TOML for a plan's document: values, then tables, then arrays of tables.

    A string is written as JSON has it, which TOML reads alike.
    """
    return "\n".join(_toml_lines(document, "")) + "\n"


def _toml_lines(table: dict[str, Any], prefix: str) -> Iterator[str]:
    later = {name: value for name, value in table.items() if _is_table(value)}
    for name, value in table.items():
        if name not in later:
            yield f"{name} = {json.dumps(value)}"
    for name, value in later.items():
        for part in value if isinstance(value, list) else [value]:
            yield ""
            yield f"[[{prefix}{name}]]" if isinstance(value, list) else f"[{prefix}{name}]"
            yield from _toml_lines(part, f"{prefix}{name}.")


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _document(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_PLAN_BYTES + 1)
    except OSError as error:
        fail(f"{path}: {error.strerror}", EX_CONFIG)
    if len(content) > _MAX_PLAN_BYTES:
        fail(f"{path}: a plan has at most {_MAX_PLAN_BYTES:,} bytes", EX_CONFIG)
    try:
        text = content.decode()
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of either format, or no UTF-8
        fail(f"{path}: {error}", EX_CONFIG)


def _tell_faults(path: Path, error: ValidationError) -> NoReturn:
    """Say every fault, one a line, and where in the plan it is."""
    *first, last = [
        f"{path}: {'.'.join(map(str, fault['loc'])) or 'the plan'}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors(include_url=False, include_input=False)[:_MAX_FAULTS]
    ]
    for line in first:
        err.print(f"sluice: {line}", markup=False)
    fail(last, EX_CONFIG)
