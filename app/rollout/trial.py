"""What a plan does with answers that their callers have by now: the shadow's comparison, the experiment's log."""

from __future__ import annotations

from app.backends.base import Call
from app.rollout.dispatch import Served
from app.rollout.evidence import Evidence
from app.rollout.experiment import Experiment
from app.rollout.record import Record
from app.rollout.shadow import Setup, Shadow


class Trial:
    """Hands answers to the shadow and the experiment while a plan asks for them.

    Args:
        shadow: Has the other arm answer too.
        experiment: Keeps what was answered to whom.
        evidence: Where the shadow's comparisons are counted.

    Attributes:
        is_on: Whether anything is to be done with answers; where not, `take` need not be called.
    """

    def __init__(self, shadow: Shadow, experiment: Experiment, evidence: Evidence) -> None:
        self.is_on = False
        self._shadow = shadow
        self._experiment = experiment
        self._evidence = evidence
        self._logs = False
        self._run_id: str | None = None

    def follow(self, record: Record) -> None:
        """Do from now on what the record's plan asks for; nothing where none is being run."""
        run = record.run if record.run is not None and record.run.active else None
        self._logs = run is not None and run.plan.experiment
        self.is_on = run is not None and (run.plan.shadow > 0 or run.plan.experiment)
        run_id = None if run is None else run.id
        if run_id != self._run_id:  # another step of the same run leaves the shadow as it is
            self._run_id = run_id
            self._shadow.configure(
                None
                if run is None
                else Setup(run.plan.shadow, record.arm("stable"), record.arm("canary"), self._evidence)
            )

    def take(self, call: Call, served: Served, *, tag: str | None) -> None:
        """Take an answer that its caller has; returns at once and never raises.

        Args:
            call: As it came to the dispatcher; one that names a version chose for itself and is left out.
            served: What it was answered.
            tag: Symbol tag of the request.
        """
        side = served.side
        if side is None or call.version is not None:
            return
        self._shadow.offer(call, served, side)
        if self._logs:
            self._experiment.record(call.request_id, call.principal, side, served, tag=tag)
