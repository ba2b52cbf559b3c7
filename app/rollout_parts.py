"""From the settings to the parts of the rollout: what is in force, what is seen of it, and who moves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from app.backends.base import Arm, Backend
from app.observability.metrics import Metrics
from app.rollout.audit import AuditLog, Change
from app.rollout.controller import Controller
from app.rollout.evidence import Evidence
from app.rollout.experiment import Experiment
from app.rollout.experiment_log import FILE_NAME, AssignmentLog
from app.rollout.gathering import Gatherer, LocalPool, RedisPool
from app.rollout.kill import KillSwitch
from app.rollout.kill_places import FILE_NAME as KILL_FILE
from app.rollout.kill_places import KillFile, SharedKills
from app.rollout.lease import LoneLease, RedisLease
from app.rollout.record import PHASES, Record
from app.rollout.rollout import Rollout, check_document
from app.rollout.shadow import Shadow
from app.rollout.shared_state import CopiedStore, RedisStore
from app.rollout.state import FileStore, StateStore
from app.rollout.trial import Trial
from app.rollout.webhook import Webhook
from app.secret_files import SecretFile
from app.settings import Settings
from app.shared.commands import Link

if TYPE_CHECKING:
    from app.api.deps import Service

AUDIT_FILE = "audit.jsonl"
_REFRESH_PERIOD_S = 0.25  # everybody sees what anybody changes within a second


class Arms(NamedTuple):
    """What answers.

    Attributes:
        backends: By name, behind no breaker.
        is_ready: Whether an answer is to be expected from this arm now, its breaker's word included.
    """

    backends: Mapping[str, Backend]
    is_ready: Callable[[Arm], bool]


class RolloutParts(NamedTuple):
    """The rollout of one worker.

    Attributes:
        rollout: The record in force.
        controller: Moves it, in one worker of all at a time.
        audit: Every change, of this gateway's workers together.
        witness: Counts what comes of live requests.
        trial: Takes what was answered, for the shadow and the experiment.
        shadow: Has the other arm answer too; to be stopped before the backends are.
        experiment: Keeps what was answered to whom.
        kills: Tells what is to be refused.
        services: The other parts, to be started with the gateway in this order.
    """

    rollout: Rollout
    controller: Controller
    audit: AuditLog
    witness: Evidence
    trial: Trial
    shadow: Shadow
    experiment: Experiment
    kills: KillSwitch
    services: Sequence[Service]


def build_rollout(
    settings: Settings,
    arms: Arms,
    *,
    store: StateStore | None,
    metrics: Metrics,
    link: Callable[[], Link | None],
    is_leaving: Callable[[], bool],
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> RolloutParts:
    """Build every part; nothing is started.

    Args:
        settings: What the operator set.
        arms: What answers, for the shadow.
        store: Where the record is kept, instead of the settings' own.
        metrics: Told of what is seen.
        link: Makes a connection to the shared Redis for one part alone; None where there is none.
        is_leaving: Whether the gateway is about to end.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch.
    """
    audit = _audit(settings, metrics, wall_clock)
    webhook = _webhook(settings, metrics, clock, wall_clock)
    kills = _kills(settings, audit, webhook, metrics, link=link(), wall_clock=wall_clock)
    shadow = _shadow(settings.model, arms, kills, metrics, is_leaving=is_leaving, clock=clock)
    witness, experiment = Evidence(), _experiment(settings, metrics, wall_clock)
    trial = Trial(shadow, experiment, witness)
    rollout = Rollout(
        _store(settings, store, link),
        initial=Record(share=settings.ray_serve_fraction, changed_at=wall_clock(), changed_by="settings"),
        audit=audit,
        announce=lambda change: _tell(webhook, change),
        on_record=lambda record: _follow(record, trial, metrics),
        refresh_period_s=_REFRESH_PERIOD_S,
    )
    pool_link, lease_link = link(), link()
    pool = LocalPool() if pool_link is None else RedisPool(pool_link)
    lease = LoneLease() if lease_link is None else RedisLease(lease_link)
    controller = Controller(rollout, pool, lease, _store(settings, store, link), wall_clock=wall_clock)
    gatherer = Gatherer(witness, pool, lambda: rollout.record)
    services: list[Service] = [audit, kills, rollout, gatherer, controller, experiment]
    if webhook is not None:
        services.insert(0, webhook)  # the others tell it things until they end
    return RolloutParts(rollout, controller, audit, witness, trial, shadow, experiment, kills, services)


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


def _follow(record: Record, trial: Trial, metrics: Metrics) -> None:
    """What else is to be done when a record comes into force."""
    trial.follow(record)
    phase = None if record.run is None else record.run.phase
    metrics.rollout.show_record(record.share, {name: name == phase for name in PHASES})


def _webhook(
    settings: Settings, metrics: Metrics, clock: Callable[[], float], wall_clock: Callable[[], float]
) -> Webhook | None:
    if settings.webhook_url is None:
        return None
    assert settings.webhook_secret_file is not None, "checked with the settings"
    return Webhook(
        settings.webhook_url,
        secret=SecretFile(settings.webhook_secret_file),
        count=metrics.changes.count_event,
        clock=clock,
        wall_clock=wall_clock,
    )


def _tell(webhook: Webhook | None, change: Change) -> None:
    """What the audit log records, as an event for others."""
    if webhook is None:
        return
    data = asdict(change)
    del data["action"], data["once"]
    webhook.send({"type": f"rollout.{change.action}", "data": data})


def _shadow(
    model: str,
    arms: Arms,
    kills: KillSwitch,
    metrics: Metrics,
    *,
    is_leaving: Callable[[], bool],
    clock: Callable[[], float],
) -> Shadow:
    return Shadow(
        arms.backends,
        is_ready=arms.is_ready,
        books=metrics.rollout,
        # Who asked and for what symbol is not known of a call any more: what was asked for before a narrower kill may
        # be compared for two seconds more, and nobody is told an answer.
        is_killed=lambda _: kills.scope_killed(model, (), None) is not None,
        is_leaving=is_leaving,
        clock=clock,
    )


def _kills(
    settings: Settings,
    audit: AuditLog,
    webhook: Webhook | None,
    metrics: Metrics,
    *,
    link: Link | None,
    wall_clock: Callable[[], float],
) -> KillSwitch:
    return KillSwitch(
        KillFile(settings.state_dir / KILL_FILE),
        None if link is None else SharedKills(link),
        audit=audit,
        wall_clock=wall_clock,
        show=metrics.changes.show_kills,
        announce=(lambda _: None) if webhook is None else webhook.send,
    )


def _experiment(settings: Settings, metrics: Metrics, wall_clock: Callable[[], float]) -> Experiment:
    log = AssignmentLog(
        settings.state_dir / FILE_NAME,
        max_age_s=settings.experiment_days * 86_400,
        max_bytes=settings.experiment_mb * 1_000_000,
        wall_clock=wall_clock,
    )
    return Experiment(log, count_loss=metrics.rollout.count_loss, wall_clock=wall_clock)
