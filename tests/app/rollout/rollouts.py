"""Rollouts from legacy to Ray Serve, and the moves that tests make with them."""

from __future__ import annotations

from app.rollout import moves
from app.rollout.moves import By
from app.rollout.record import Record
from app.rollout.rollout import Rollout
from app.rollout.state import StateStore


def record_of(share: float) -> Record:
    """What the settings would give."""
    return Record(share=share, changed_at=1.0, changed_by="settings")


def rollout_over(store: StateStore, share: float = 1.0, *, refresh_period_s: float | None = None) -> Rollout:
    """A rollout over the store, with this share where the store has none."""
    return Rollout(store, initial=record_of(share), refresh_period_s=refresh_period_s)


async def set_share(rollout: Rollout, share: float, actor: str = "ann") -> Record:
    """As an operator sets it by hand."""
    return await rollout.change(lambda record: moves.set_share(record, share, By(actor, 7.0)))
