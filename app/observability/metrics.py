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
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_MAX_VERSIONS = 32


class _Answered(NamedTuple):
    """The series in which the answers of one version and arm are counted."""

    requests: Counter
    latency: Histogram
    windows: Counter


class Metrics:
    """One application's metrics, in a registry of its own so that many applications fit in a process.

    Args:
        multiproc_dir: Folder in which several workers add up their metrics; the client library must have been
            imported with PROMETHEUS_MULTIPROC_DIR set. None for a single worker.
    """

    def __init__(self, multiproc_dir: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._multiproc_dir = multiproc_dir
        self._versions: set[str] = set()
        self._answered_series: dict[tuple[str, str], _Answered] = {}
        self._http_series: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry, multiprocess_mode="livemostrecent")
        kind = BufferedHistogram if multiproc_dir is None else Histogram
        histogram = partial(kind, registry=self.registry, buckets=LATENCY_BUCKETS_S)

        by_version = ["model_version"]
        self._requests = counter(
            "cnn_lstm_prediction_requests_total", "Prediction requests, answered or refused", by_version
        )
        self._latency = histogram(
            "cnn_lstm_prediction_latency_seconds", "What the caller of an answered prediction waited here", by_version
        )
        self._errors = counter(
            "cnn_lstm_prediction_errors_total",
            "Prediction requests refused or failed, by kind",
            [*by_version, "error_type"],
        )
        self._gpu = gauge("cnn_lstm_gpu_utilization_percent", "GPU utilization of a replica's device", ["gpu_id"])
        self._replicas = gauge("cnn_lstm_replicas_total", "Replicas that can answer")
        self._rejecting = gauge(
            "cnn_lstm_replicas_rejecting",
            "Replicas that refused the version they were told to serve, and serve another",
        )

        stages = histogram(
            "gateway_stage_seconds", "Where answered predictions spent their time", ["stage"], buckets=_STAGE_BUCKETS_S
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        self._windows = counter("gateway_windows_total", "Windows predicted, by arm", ["arm"])
        self._fallbacks = counter(
            "gateway_fallbacks_total", "Answers of legacy because Ray Serve failed, by kind of failure", ["reason"]
        )
        worst = partial(Gauge, registry=self.registry, multiprocess_mode="livemax")
        self._breakers = worst(
            "gateway_breaker_state", "Breaker of an arm: 0 closed, 1 recovering, 2 open; of the worst worker", ["arm"]
        )
        self._openings = counter(
            "gateway_breaker_openings_total", "How often an arm's breaker opened, by kind of failure", ["arm", "reason"]
        )
        self._retries = counter(
            "gateway_retries_total", "Groups whose replica was lost, by whether they were sent again", ["outcome"]
        )
        self._auth_failures = counter(
            "gateway_auth_failures_total", "Credentials that did not count, by reason", ["reason"]
        )
        self._key_reloads = counter(
            "gateway_key_reloads_total", "Sets of keys that were taken or refused", ["keys", "outcome"]
        )
        self._keys = gauge("gateway_keys", "Keys in force", ["keys"])
        self._allowances = counter(
            "gateway_rate_limit_decisions_total",
            "Requests admitted or refused by a limit, by policy and by who counted",
            ["policy", "mode", "outcome"],
        )
        self._allowance_series: dict[tuple[str, str, bool], Counter] = {}
        self._limits_local = worst("gateway_rate_limit_local", "1 while Redis is away and each worker counts alone")
        self._loop_lag = histogram(
            "gateway_event_loop_lag_seconds", "By how much the event loop is late", buckets=_LAG_BUCKETS_S
        )
        self._dropped_lines = counter(
            "gateway_log_lines_dropped_total", "Log lines that nobody took: a full disk, a closed or slow pipe"
        )
        self._http = counter(
            "http_requests_total", "Requests by method, route template and status", ["method", "handler", "status"]
        )
        self._http_latency = histogram(
            "http_request_duration_seconds", "Duration of requests by route template", ["handler"]
        )

    def count_prediction(
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

    def count_auth_failure(self, reason: str) -> None:
        """Count one credential that did not count; `reason` is one of `app.auth.FAILURES`."""
        self._auth_failures.labels(reason).inc()

    def count_key_reload(self, what: str, outcome: str, in_force: int) -> None:
        """Count one set of keys that was taken or refused, and show how many keys are in force now.

        Args:
            what: `tokens` or `api_keys`.
            outcome: `taken` or `refused`.
            in_force: Keys.
        """
        self._key_reloads.labels(what, outcome).inc()
        self._keys.labels(what).set(in_force)

    def count_refusal(self, code: str) -> None:
        """Count one prediction request that was refused or failed; `code` is a problem code, a closed set."""
        self._requests.labels(NO_VERSION).inc()
        self._errors.labels(NO_VERSION, code).inc()

    def show_breaker(self, arm: str, state: State, reason: str) -> None:
        """Take over the new state of an arm's breaker, and the code of the failure that led to it."""
        self._breakers.labels(arm).set(state.value)
        if state is State.OPEN:
            self._openings.labels(arm, reason if reason in ERRORS_BY_CODE else "other").inc()

    def count_retry(self, *, is_made: bool) -> None:
        """Count a group of windows that lost its replica: sent once more, or refused by the budget."""
        self._retries.labels("made" if is_made else "over-budget").inc()

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

    def show_replicas(self, count: int, gpu_percent: Mapping[str, float], *, rejecting: int = 0) -> None:
        """Take over how many replicas there are, how busy each device is, and how many refused a version."""
        self._replicas.set(count)
        self._rejecting.set(rejecting)
        for gpu_id, percent in gpu_percent.items():
            self._gpu.labels(gpu_id).set(percent)

    def count_request(self, *, method: str, route: str, status: str, seconds: float) -> None:
        """Count one HTTP request.

        Args:
            method: Any; unusual ones are counted together.
            route: Template of the route, never the path that was asked for.
            status: Three digits.
            seconds: From the request's arrival to the end of the answer.
        """
        key = method if method in METHODS else "other", route, status
        if (series := self._http_series.get(key)) is None:
            series = self._http_series[key] = self._http.labels(*key), self._http_latency.labels(route)
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
        return {
            "predictions": _sum(self._requests) - _sum(self._errors),
            "refusals": {labels["error_type"]: value for labels, value in _values(self._errors)},
            "auth_failures": {labels["reason"]: value for labels, value in _values(self._auth_failures)},
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


def _values(counter: Counter) -> Iterable[tuple[dict[str, str], int]]:
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                yield sample.labels, int(sample.value)


def _sum(counter: Counter) -> int:
    return sum(value for _, value in _values(counter))
