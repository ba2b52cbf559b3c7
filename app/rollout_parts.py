"""From the settings to the parts of the rollout: what is in force, what is seen of it, and who moves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from app.observability.metrics import Metrics
from app.rollout.audit import AuditLog
from app.rollout.controller import Controller
from app.rollout.evidence import Evidence
from app.rollout.experiment import Experiment
from app.rollout.experiment_log import FILE_NAME, AssignmentLog
from app.rollout.gathering import Gatherer, LocalPool, RedisPool
from app.rollout.kill import KillSwitch
from app.rollout.kill_places import KillFile, SharedKills
from app.rollout.lease import LoneLease, RedisLease
from app.rollout.record import Record
from app.rollout.rollout import Rollout, check_document
from app.rollout.shared_state import CopiedStore, RedisStore
from app.rollout.state import FileStore, StateStore
from app.settings import Settings
from app.shared.commands import Link

if TYPE_CHECKING:
    from app.api.deps import Service

AUDIT_FILE = "audit.jsonl"
KILL_FILE = "kill.json"
_REFRESH_PERIOD_S = 0.25  # everybody sees what anybody changes within a second


class RolloutParts(NamedTuple):
    """The rollout of one worker.

    Attributes:
        rollout: The record in force.
        controller: Moves it, in one worker of all at a time.
        audit: Every change, of this gateway's workers together.
        witness: Counts what comes of live requests.
        experiment: Keeps what was answered to whom.
        kills: Tells what is to be refused.
        services: To be started with the gateway, in this order.
    """

    rollout: Rollout
    controller: Controller
    audit: AuditLog
    witness: Evidence
    experiment: Experiment
    kills: KillSwitch
    services: Sequence[Service]


def build_rollout(
    settings: Settings,
    *,
    store: StateStore | None,
    metrics: Metrics,
    link: Callable[[], Link | None],
    wall_clock: Callable[[], float],
) -> RolloutParts:
    """Build every part; nothing is started.

    Args:
        settings: What the operator set.
        store: Where the record is kept, instead of the settings' own.
        metrics: Told of what is seen.
        link: Makes a connection to the shared Redis for one part alone; None where there is none.
        wall_clock: Seconds since the epoch.
    """
    audit = _audit(settings, metrics, wall_clock)
    rollout = Rollout(
        _store(settings, store, link),
        initial=Record(share=settings.ray_serve_fraction, changed_at=wall_clock(), changed_by="settings"),
        audit=audit,
        refresh_period_s=_REFRESH_PERIOD_S,
    )
    pool_link, lease_link = link(), link()
    pool = LocalPool() if pool_link is None else RedisPool(pool_link)
    lease = LoneLease() if lease_link is None else RedisLease(lease_link)
    controller = Controller(rollout, pool, lease, _store(settings, store, link), wall_clock=wall_clock)
    witness = Evidence()
    gatherer = Gatherer(witness, pool, lambda: rollout.record)
    experiment = _experiment(settings, metrics, wall_clock)
    kills = _kills(settings, audit, metrics, link(), wall_clock)
    services = (audit, kills, rollout, gatherer, controller, experiment)
    return RolloutParts(rollout, controller, audit, witness, experiment, kills, services)


def _store(settings: Settings, store: StateStore | None, link: Callable[[], Link | None]) -> StateStore:
    if store is not None:
        return store
    files = FileStore(settings.state_dir, check_document)
    shared = link()
    return files if shared is None else CopiedStore(RedisStore(shared, check_document), files)


def _audit(settings: Settings, metrics: Metrics, wall_clock: Callable[[], float]) -> AuditLog:
    return AuditLog(
        settings.state_dir / AUDIT_FILE,
        wall_clock=wall_clock,
        on_head=lambda head: metrics.changes.show_audit_head(head.records, head.number),
        on_missed=metrics.changes.count_missed_record,
        show_broken=metrics.changes.show_audit_broken,
    )


def _kills(
    settings: Settings, audit: AuditLog, metrics: Metrics, link: Link | None, wall_clock: Callable[[], float]
) -> KillSwitch:
    return KillSwitch(
        KillFile(settings.state_dir / KILL_FILE),
        None if link is None else SharedKills(link),
        audit=audit,
        wall_clock=wall_clock,
        show=metrics.changes.show_kills,
    )


def _experiment(settings: Settings, metrics: Metrics, wall_clock: Callable[[], float]) -> Experiment:
    log = AssignmentLog(
        settings.state_dir / FILE_NAME,
        max_age_s=settings.experiment_days * 86_400,
        max_bytes=settings.experiment_mb * 1_000_000,
        wall_clock=wall_clock,
    )
    return Experiment(log, count_loss=metrics.rollout.count_loss, wall_clock=wall_clock)
