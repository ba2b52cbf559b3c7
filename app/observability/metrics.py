"""What Prometheus sees: the `cnn_lstm_*` family, the gateway's stages, and the HTTP family of the instrumentator."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_fastapi_instrumentator.metrics import Info

from app.backends.breaker import State
from app.observability.histogram import BufferedHistogram
from app.observability.ledger import STAGES
from app.observability.metric_files import read_metrics
from serve_app.contract import ERRORS_BY_CODE

NO_VERSION = "none"

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_STAGE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_DISTANCE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_GAP_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.64, 3.0, 10.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_MAX_VERSIONS = 32


class _Maker:
    """Makes the series of one application, all in its registry.

    Args:
        registry: Where they go.
        is_alone: Whether this process is the only one that counts, so that its histograms may be its own.
    """

    def __init__(self, registry: CollectorRegistry, *, is_alone: bool) -> None:
        self.counter = partial(Counter, registry=registry)
        self.gauge = partial(Gauge, registry=registry, multiprocess_mode="livemostrecent")
        self.worst = partial(Gauge, registry=registry, multiprocess_mode="livemax")
        kind = BufferedHistogram if is_alone else Histogram
        self.histogram = partial(kind, registry=registry, buckets=LATENCY_BUCKETS_S)


class _Answered(NamedTuple):
    """The series in which the answers of one version and arm are counted."""

    requests: Counter
    latency: Histogram
    windows: Counter


class PredictionMetrics:
    """What was asked and answered, by whom and in what time."""

    def __init__(self, make: _Maker) -> None:
        self._versions: set[str] = set()
        self._answered_series: dict[tuple[str, str], _Answered] = {}
        self._requests = make.counter(
            "cnn_lstm_prediction_requests_total", "Prediction requests, answered or refused", ["model_version"]
        )
        self._latency = make.histogram(
            "cnn_lstm_prediction_latency_seconds",
            "What the caller of an answered prediction waited here",
            ["model_version"],
        )
        self._errors = make.counter(
            "cnn_lstm_prediction_errors_total",
            "Prediction requests refused or failed, by kind",
            ["model_version", "error_type"],
        )
        stages = make.histogram(
            "gateway_stage_seconds", "Where answered predictions spent their time", ["stage"], buckets=_STAGE_BUCKETS_S
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        self._windows = make.counter("gateway_windows_total", "Windows predicted, by arm", ["arm"])
        self._fallbacks = make.counter(
            "gateway_fallbacks_total",
            "Answers of another arm because the one that was asked first failed, by kind of failure",
            ["reason"],
        )

    def count_answer(
        self,
        *,
        version: str,
        arm: str,
        fallback: str | None,
        windows: int,
        seconds: float,
        stages_ms: Mapping[str, float],
    ) -> None:
        """Count one answered prediction."""
        answered = self._answered(version, arm)
        answered.requests.inc()
        answered.latency.observe(seconds)
        answered.windows.inc(windows)
        if fallback is not None:
            self._fallbacks.labels(fallback if fallback in ERRORS_BY_CODE else "other").inc()
        for stage, duration_ms in stages_ms.items():
            self._stages[stage].observe(duration_ms / 1e3)

    def count_refusal(self, code: str) -> None:
        """Count one prediction request that was refused or failed; `code` is a problem code, a closed set."""
        self._requests.labels(NO_VERSION).inc()
        self._errors.labels(NO_VERSION, code).inc()

    def totals(self) -> dict[str, Any]:
        """This worker's counts for `/stats`."""
        return {
            "predictions": _sum(self._requests) - _sum(self._errors),
            "refusals": {labels["error_type"]: value for labels, value in _values(self._errors)},
            "windows": {labels["arm"]: value for labels, value in _values(self._windows)},
            "fallbacks": {labels["reason"]: value for labels, value in _values(self._fallbacks)},
        }

    def _answered(self, version: str, arm: str) -> _Answered:
        """Finding a series by its labels costs as much as counting in it."""
        label = self._version(version)
        if (series := self._answered_series.get((label, arm))) is None:
            series = self._answered_series[label, arm] = _Answered(
                self._requests.labels(label), self._latency.labels(label), self._windows.labels(arm)
            )
        return series

    def _version(self, version: str) -> str:
        """Versions come from the registry; the bound holds even against a backend that makes them up."""
        if version not in self._versions:
            if len(self._versions) >= _MAX_VERSIONS:
                return "other"
            self._versions.add(version)
        return version


class ArmMetrics:
    """How the arms and their replicas are."""

    def __init__(self, make: _Maker) -> None:
        self._gpu = make.gauge("cnn_lstm_gpu_utilization_percent", "GPU utilization of a replica's device", ["gpu_id"])
        self._replicas = make.gauge("cnn_lstm_replicas_total", "Replicas that can answer")
        self._rejecting = make.gauge(
            "cnn_lstm_replicas_rejecting",
            "Replicas that refused the version they were told to serve, and serve another",
        )
        self._breakers = make.worst(
            "gateway_breaker_state", "Breaker of an arm: 0 closed, 1 recovering, 2 open; of the worst worker", ["arm"]
        )
        self._openings = make.counter(
            "gateway_breaker_openings_total", "How often an arm's breaker opened, by kind of failure", ["arm", "reason"]
        )
        self._retries = make.counter(
            "gateway_retries_total", "Groups whose replica was lost, by whether they were sent again", ["outcome"]
        )

    def show_breaker(self, arm: str, state: State, reason: str) -> None:
        """Take over the new state of an arm's breaker, and the code of the failure that led to it."""
        self._breakers.labels(arm).set(state.value)
        if state is State.OPEN:
            self._openings.labels(arm, reason if reason in ERRORS_BY_CODE else "other").inc()

    def count_retry(self, *, is_made: bool) -> None:
        """Count a group of windows that lost its replica: sent once more, or refused by the budget."""
        self._retries.labels("made" if is_made else "over-budget").inc()

    def show_replicas(self, count: int, gpu_percent: Mapping[str, float], *, rejecting: int = 0) -> None:
        """Take over how many replicas there are, how busy each device is, and how many refused a version."""
        self._replicas.set(count)
        self._rejecting.set(rejecting)
        for gpu_id, percent in gpu_percent.items():
            self._gpu.labels(gpu_id).set(percent)


class RolloutMetrics:
    """What is in force, what the shadow compared and left out, and what is missing from the experiment's log."""

    def __init__(self, make: _Maker) -> None:
        self._share = make.gauge(
            "gateway_rollout_share", "Share of callers on the canary, 0..1, but for those with a share of their own"
        )
        self._phases = make.gauge(
            "gateway_rollout_phase", "1 for the phase that the last plan is in, 0 for every other one", ["phase"]
        )
        self._shadowed = make.counter(
            "gateway_shadow_requests_total", "Requests chosen for the shadow, by what became of them", ["outcome"]
        )
        self._latency = make.histogram(
            "gateway_shadow_latency_seconds",
            "How long each side's arm took for requests that both have answered",
            ["side"],
            buckets=_STAGE_BUCKETS_S,
        )
        self._distance = make.histogram(
            "gateway_shadow_distance",
            "Total variation distance of the sides' class probabilities, by window",
            buckets=_DISTANCE_BUCKETS,
        )
        self._gap = make.histogram(
            "gateway_shadow_regression_gap",
            "Distance of the sides' expected returns in combined standard deviations, by window",
            buckets=_GAP_BUCKETS,
        )
        self._losses = make.counter(
            "gateway_experiment_dropped_total", "Requests that are missing from the experiment's log", ["reason"]
        )

    def show_record(self, share: float, phases: Mapping[str, bool]) -> None:
        """Take over the canary's share, 0..1, and of each phase, a closed set, whether the last plan is in it."""
        self._share.set(share)
        for phase, is_there in phases.items():
            self._phases.labels(phase).set(is_there)

    def count(self, outcome: str) -> None:
        """Count one request chosen for the shadow; `outcome` is one of `app.rollout.shadow.Outcome`."""
        self._shadowed.labels(outcome).inc()

    def observe_latency(self, side: str, seconds: float) -> None:
        """Count how long a side took for a request that both have answered; `stable` or `canary`."""
        self._latency.labels(side).observe(seconds)

    def observe_distances(self, distances: Iterable[float]) -> None:
        """Count total variation distances, 0..1, one for each window."""
        for distance in distances:
            self._distance.observe(distance)

    def observe_gaps(self, gaps: Iterable[float]) -> None:
        """Count distances of expected returns, 0 or more, one for each window; arms sure of different things: ∞."""
        for gap in gaps:
            self._gap.observe(min(gap, 100.0))  # an infinite one would be the sum for ever

    def count_loss(self, reason: str, count: int) -> None:
        """Count requests that the log has lost, from any thread; `reason` is one of `app.rollout.experiment.Loss`."""
        self._losses.labels(reason).inc(count)


class AccessMetrics:
    """Who was let in, by which keys, and how much of that the limits admitted."""

    def __init__(self, make: _Maker) -> None:
        self._allowance_series: dict[tuple[str, str, bool], Counter] = {}
        self._failures = make.counter(
            "gateway_auth_failures_total", "Credentials that did not count, by reason", ["reason"]
        )
        self._reloads = make.counter(
            "gateway_key_reloads_total", "Sets of keys that were taken or refused", ["keys", "outcome"]
        )
        self._keys = make.gauge("gateway_keys", "Keys in force", ["keys"])
        self._allowances = make.counter(
            "gateway_rate_limit_decisions_total",
            "Requests admitted or refused by a limit, by policy and by who counted",
            ["policy", "mode", "outcome"],
        )
        self._limits_local = make.worst(
            "gateway_rate_limit_local", "1 while Redis is away and each worker counts alone"
        )

    def count_failure(self, reason: str) -> None:
        """Count one credential that did not count; `reason` is one of `app.auth.FAILURES`."""
        self._failures.labels(reason).inc()

    def count_reload(self, what: str, outcome: str, in_force: int) -> None:
        """Count one set of keys that was taken or refused, and show how many keys are in force now.

        Args:
            what: `tokens` or `api_keys`.
            outcome: `taken` or `refused`.
            in_force: Keys.
        """
        self._reloads.labels(what, outcome).inc()
        self._keys.labels(what).set(in_force)

    def count_allowance(self, policy: str, mode: str, admitted: bool) -> None:
        """Count what a limit decided; policy and mode are closed sets."""
        key = policy, mode, admitted
        if (series := self._allowance_series.get(key)) is None:
            outcome = "admitted" if admitted else "refused"
            series = self._allowance_series[key] = self._allowances.labels(policy, mode, outcome)
        series.inc()

    def show_limits_local(self, away: bool) -> None:
        """Take over whether Redis is away, so that this worker counts alone."""
        self._limits_local.set(away)

    def failures(self) -> dict[str, int]:
        """This worker's failures by reason, for `/stats`."""
        return {labels["reason"]: value for labels, value in _values(self._failures)}


class ChangeMetrics:
    """What operators and the gateway changed: the audit log's end, and what is killed."""

    def __init__(self, make: _Maker) -> None:
        self._records = make.gauge("gateway_audit_records", "Records in this gateway's audit log")
        self._head = make.gauge("gateway_audit_head", "First 52 bits of the hash of the audit log's last record")
        self._broken = make.worst("gateway_audit_broken", "1 while the audit log is not what was written")
        self._missed = make.counter(
            "gateway_audit_missed_total", "Changes that were made although they could not be recorded"
        )
        self._kills = make.worst("gateway_kills", "Kills in force, by scope", ["scope"])
        self._killed = make.counter(
            "gateway_killed_requests_total", "Prediction requests refused by the kill switch, by scope", ["scope"]
        )
        self._events = make.counter(
            "gateway_webhook_events_total", "Events for the webhook, by what became of them", ["outcome"]
        )

    def show_audit_head(self, records: int, head: int) -> None:
        """Take over where the audit log ends: how many records, and 52 bits of the last one's hash."""
        self._records.set(records)
        self._head.set(head)

    def show_audit_broken(self, broken: bool) -> None:
        """Take over whether the audit log is not what was written; from any thread."""
        self._broken.set(broken)

    def count_missed_record(self) -> None:
        """Count a change that was made although it could not be recorded."""
        self._missed.inc()

    def show_kills(self, counts: Mapping[str, int]) -> None:
        """Take over how many kills are in force, by scope, a closed set."""
        for scope, count in counts.items():
            self._kills.labels(scope).set(count)

    def count_killed(self, scope: str) -> None:
        """Count a request that was refused because of a kill of this scope."""
        self._killed.labels(scope).inc()

    def count_event(self, outcome: str) -> None:
        """Count an event for the webhook; `outcome` is one of `app.rollout.webhook.Outcome`."""
        self._events.labels(outcome).inc()


class HttpMetrics:
    """Every HTTP request, and how well the process keeps up with them."""

    def __init__(self, make: _Maker) -> None:
        self._series: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        self._requests = make.counter(
            "http_requests_total", "Requests by method, route template and status", ["method", "handler", "status"]
        )
        self._latency = make.histogram(
            "http_request_duration_seconds", "Duration of requests by route template", ["handler"]
        )
        self._loop_lag = make.histogram(
            "gateway_event_loop_lag_seconds", "By how much the event loop is late", buckets=_LAG_BUCKETS_S
        )
        self._dropped_lines = make.counter(
            "gateway_log_lines_dropped_total", "Log lines that nobody took: a full disk, a closed or slow pipe"
        )

    def count_request(self, *, method: str, route: str, status: str, seconds: float) -> None:
        """Count one HTTP request.

        Args:
            method: Any; unusual ones are counted together.
            route: Template of the route, never the path that was asked for.
            status: Three digits.
            seconds: From the request's arrival to the end of the answer.
        """
        key = method if method in METHODS else "other", route, status
        if (series := self._series.get(key)) is None:
            series = self._series[key] = self._requests.labels(*key), self._latency.labels(route)
        requests, latency = series
        requests.inc()
        latency.observe(seconds)

    def count_instrumented(self, info: Info) -> None:
        """`count_request`, as prometheus-fastapi-instrumentator calls it."""
        self.count_request(
            method=info.method,
            route=info.modified_handler,
            status=info.modified_status,
            seconds=info.modified_duration,
        )

    def observe_loop_lag(self, seconds: float) -> None:
        """Count one measurement of the event loop's lag."""
        self._loop_lag.observe(seconds)

    def count_dropped_lines(self, count: int) -> None:
        """Count log lines that could not be written; from any thread."""
        self._dropped_lines.inc(count)


class Metrics:
    """One application's metrics, in a registry of its own so that many applications fit in a process.

    Args:
        multiproc_dir: Folder in which several workers add up their metrics; the client library must have been
            imported with PROMETHEUS_MULTIPROC_DIR set. None for a single worker.
    """

    def __init__(self, multiproc_dir: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._multiproc_dir = multiproc_dir
        make = _Maker(self.registry, is_alone=multiproc_dir is None)
        self.predictions = PredictionMetrics(make)
        self.arms = ArmMetrics(make)
        self.rollout = RolloutMetrics(make)
        self.access = AccessMetrics(make)
        self.changes = ChangeMetrics(make)
        self.http = HttpMetrics(make)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes; over all workers where there are several."""
        return generate_latest(self.registry) if self._multiproc_dir is None else read_metrics(self._multiproc_dir)

    async def scrape(self) -> bytes:
        """`exposition`, without holding up the event loop for the files of other workers."""
        if self._multiproc_dir is None:
            return self.exposition()  # its histograms belong to the loop's thread
        return await asyncio.to_thread(read_metrics, self._multiproc_dir)

    def totals(self) -> dict[str, Any]:
        """This worker's counts for `/stats`."""
        return {**self.predictions.totals(), "auth_failures": self.access.failures()}


def _values(counter: Counter) -> Iterable[tuple[dict[str, str], int]]:
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                yield sample.labels, int(sample.value)


def _sum(counter: Counter) -> int:
    return sum(value for _, value in _values(counter))
