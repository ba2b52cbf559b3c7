"""How every command speaks: answers on standard output, all else on standard error, a fault as one plain line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

T = TypeVar("T")

EX_CONFIG = 78  # sysexits.h: something is wrong with the configuration

_UNFOLDED = 10_000  # columns: what another program reads is not folded

out = Console(width=None if sys.stdout.isatty() else _UNFOLDED)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one plain line and end."""
    err.print(f"sluice: {message}", markup=False)
    sys.exit(code)


def told(ask: Callable[[], T]) -> T:
    """The answer, or one plain line for what is known to go wrong."""
    from app.client import GatewayRefused
    from app.symbol_report import NoWindow
    from serve_app.registry import RegistryError
    from serve_app.signing import KeyRefused

    try:
        return ask()
    except (GatewayRefused, RegistryError, KeyRefused, NoWindow) as error:
        fail(str(error))


def save_picture(path: Path, content: bytes) -> None:
    """Write it, or say in one plain line why not."""
    try:
        path.write_bytes(content)
    except OSError as error:
        fail(f"the picture cannot be written: {path}: {error.strerror}")


def require_extra(extra: str, purpose: str, *modules: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        fail(f"{purpose} needs {' and '.join(missing)}: pip install 'sluice[{extra}]'", EX_CONFIG)
