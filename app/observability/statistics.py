"""Cumulative figures of each model version, as Triton's statistics extension arranges them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_VERSIONS = 32
_OTHER = "other"


@dataclass(slots=True)
class _Duration:
    """How often something happened and for how long in all; shares of what several requests shared add up."""

    count: float = 0.0
    total_ms: float = 0.0

    def add(self, duration_ms: float, count: float = 1.0) -> None:
        self.count += count
        self.total_ms += duration_ms

    def document(self) -> dict[str, int]:
        return {"count": round(self.count), "ns": round(1e6 * self.total_ms)}


@dataclass(slots=True)
class _Compute:
    """From a request's bytes to its answer's, without waiting and transport."""

    compute_input: _Duration = field(default_factory=_Duration)
    compute_infer: _Duration = field(default_factory=_Duration)
    compute_output: _Duration = field(default_factory=_Duration)

    def add(self, stages_ms: Mapping[str, float], *, part: float = 1.0, share: float = 1.0) -> None:
        """Book this part of a request, and the share that it had of one execution."""
        self.compute_input.add(part * stages_ms.get("decode", 0.0), share)
        self.compute_infer.add(share * stages_ms.get("model", 0.0), share)
        self.compute_output.add(part * stages_ms.get("encode", 0.0), share)

    def document(self) -> dict[str, dict[str, int]]:
        return {name: getattr(self, name).document() for name in ("compute_input", "compute_infer", "compute_output")}


@dataclass(slots=True)
class _Row:
    """One version's figures."""

    last_inference: float = 0.0
    windows: int = 0
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    compute: _Compute = field(default_factory=_Compute)
    batches: dict[int, _Compute] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        executions = sum(batch.compute_infer.count for batch in self.batches.values())
        return {
            "last_inference": round(1e3 * self.last_inference),
            "inference_count": self.windows,
            "execution_count": round(executions),
            "inference_stats": {
                "success": self.success.document(),
                "fail": self.fail.document(),
                "queue": self.queue.document(),
                **self.compute.document(),
                "cache_hit": _Duration().document(),  # answers are not cached
                "cache_miss": _Duration().document(),
            },
            "batch_stats": [{"batch_size": size, **batch.document()} for size, batch in sorted(self.batches.items())],
        }


class InferenceStatistics:
    """Counts what became of predictions since the start, by model version; of one worker.

    `queue` is the wait in the gateway and at the model, `compute_input` and `compute_output` are decoding and encoding,
    `compute_infer` is the forward pass, and `success` is all that the caller waited. An execution is a group of windows
    as the gateway sends it; each request in it accounts for its share.

    Args:
        wall_clock: Seconds since the epoch.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._rows: dict[str | None, _Row] = {}
        self._latest: str | None = None

    def count_answer(
        self,
        version: str | None,
        *,
        windows: int,
        groups: Iterable[tuple[int, int]],
        duration_ms: float,
        stages_ms: Mapping[str, float],
    ) -> None:
        """Count one answered request.

        Args:
            version: That answered; None from a remote service, which does not tell it.
            windows: Of the request.
            groups: For each part of it, its windows and those of the group in which it was sent.
            duration_ms: What the caller waited.
            stages_ms: The ledger's stages.
        """
        row = self._row(version)
        row.last_inference = self._wall_clock()
        row.windows += windows
        row.success.add(duration_ms)
        row.queue.add(stages_ms.get("queue", 0.0) + stages_ms.get("batch", 0.0))
        row.compute.add(stages_ms)
        for part_windows, group_windows in groups:
            batch = row.batches.get(group_windows)
            if batch is None:
                batch = row.batches[group_windows] = _Compute()
            batch.add(stages_ms, part=part_windows / windows, share=part_windows / group_windows)

    def count_failure(self, version: str | None, duration_ms: float) -> None:
        """Count one request that reached the model side and failed there.

        Args:
            version: That the caller named, None for whichever is served; one that never answered gets no row.
            duration_ms: What the caller waited.
        """
        known = version if version in self._rows else self._latest
        self._rows.setdefault(known, _Row()).fail.add(duration_ms)

    def versions(self) -> set[str]:
        """Versions that have figures."""
        return {version for version in self._rows if version is not None}

    def document(self, version: str | None) -> dict[str, Any]:
        """The figures of a version, JSON-ready; None for what cannot be told by version."""
        return self._rows.get(version, _Row()).document()

    def has_unversioned(self) -> bool:
        """Whether there are figures that cannot be told by version."""
        return None in self._rows

    def _row(self, version: str | None) -> _Row:
        row = self._rows.get(version)
        if row is None:
            version = version if len(self._rows) < _MAX_VERSIONS else _OTHER
            row = self._rows.setdefault(version, _Row())
        self._latest = version
        return row
