"""`sluice rollout verify`: whether the audit log is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli.terminal import EX_CONFIG, fail, out
from app.environment import load_settings


def rollout_verify(
    file: Annotated[Path | None, typer.Argument(help="The log; default: audit.jsonl in the state folder.")] = None,
    head: Annotated[
        str | None,
        typer.Option(help="What was once seen of its end: the hash, or the metric gateway_audit_head."),
    ] = None,
) -> None:
    """Look for a changed byte, a line that is missing, moved or put in, and a cut end. 0: whole, 1: not."""
    from app.rollout.audit import ChainBroken, verify

    path = file or load_settings().state_dir / "audit.jsonl"
    try:
        end = verify(path, head)
    except ChainBroken as broken:
        fail(f"{path} is not what was written: {broken}")
    except FileNotFoundError:
        # Whoever has seen a head knows that there was a file.
        fail(f"there is no {path}", EX_CONFIG if head is None else 1)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", EX_CONFIG)
    out.print(f"{end.records} records, head {end.hash} ({end.number})", soft_wrap=True, highlight=False)
