"""What the product has to reach, each judged by one run's figures. A goal that is missed is told, nothing more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.figures import (
    Key,
    Results,
    Spread,
    by_round,
    n_failed,
    over_rounds,
    p99_ms,
    ratio,
    rps,
    share_of_bare,
    spread,
)
from benchmarks.rounds import NOOP, SHIPPED, SMALL

PYTHON_PEERS = ("litserve", "bentoml", "mosec", "mosec_10ms")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was measured.

    Attributes:
        text: The goal.
        limit: What it asks for.
        at_least: Whether more is better.
        measured: Over the rounds; None where it was not measured.
        note: What else has to be said.
        failed: Requests that failed in the rows this rests on.
    """

    text: str
    limit: float
    at_least: bool
    measured: Spread | None
    unit: str = "×"
    note: str = ""
    failed: int = 0

    @property
    def is_met(self) -> bool | None:
        """By the median; None where nothing was measured. A row with failed requests meets nothing."""
        if self.measured is None:
            return None
        value = self.measured.median
        return self.failed == 0 and (value >= self.limit if self.at_least else value <= self.limit)

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.is_met]


def judge(results: Results) -> list[Verdict]:
    """Every goal, in the order of the table."""
    return [
        *_noop_goals(results),
        *_served_goals(results),
        *_latency_goals(results),
        _falling_cost(results),
    ]


def _noop_goals(results: Results) -> Iterable[Verdict]:
    document = Key("document_stack", NOOP, "json")
    triton_json, triton_binary = Key("triton", NOOP, "json"), Key("triton", NOOP, "binary")
    ours_json, ours_binary = Key("sluice", NOOP, "json"), Key("sluice", NOOP, "binary")
    python = _best(results, [Key(name, NOOP, "json") for name in PYTHON_PEERS])
    tuned = _best(results, [Key(name, NOOP, lane) for name in PYTHON_PEERS for lane in ("json", "json_orjson")])
    level = "the aim is 1.5"
    yield _faster(results, "noop, JSON, over the design document's stack", 8.0, ours_json, document)
    yield _faster(results, "noop, JSON, over the best Python peer as it comes", 2.5, ours_json, python)
    yield _faster(results, "noop, JSON, over the best Python peer with orjson put in", 2.5, ours_json, tuned)
    yield _faster(results, "noop, binary, over the design document's stack in JSON", 12.0, ours_binary, document)
    yield replace(_faster(results, "noop, JSON, over Triton", 1.0, ours_json, triton_json), note=level)
    yield replace(_faster(results, "noop, binary, over Triton", 1.0, ours_binary, triton_binary), note=level)


def _served_goals(results: Results) -> Iterable[Verdict]:
    small = Key("sluice", SMALL, "binary", windows=8)
    share = share_of_bare(results, small)
    yield _with_failures(
        results, Verdict("about 1 ms per window, 8 per request: share of the bare engine", 0.8, True, share, ""), small
    )
    ours = Key("sluice", SHIPPED, "binary")
    others = [
        Key(name, SHIPPED, lane)
        for name in (*PYTHON_PEERS, "document_stack")
        for lane in ("binary", "json", "json_orjson")
    ]
    yield _faster(results, "shipped model, binary, over Triton", 1.3, ours, Key("triton", SHIPPED, "binary"))
    yield _faster(results, "shipped model, binary, over the best other peer", 1.0, ours, _best(results, others))


def _latency_goals(results: Results) -> Iterable[Verdict]:
    for loop, how in (("closed", "closed loop"), ("open", "at 80 % of each one's peak")):
        for model, windows in ((SMALL, 8), (SHIPPED, 1)):
            ours = Key("sluice", model, "binary", windows=windows, loop=loop)
            measured = ratio(results, ours, replace(ours, system="triton"), p99_ms)
            text = f"{model}, binary: p99 over Triton's, {how}"
            yield _with_failures(results, Verdict(text, 1.0, False, measured), ours)
    added = results.get("one_connection", {}).get("added_over_engine_in_turn_ms")
    measured = Spread(added["median"], added["min"], added["max"]) if added else None
    yield Verdict("one connection: p50 over the bare engine in turn, five rounds", 2.0, False, measured, " ms")
    for model, lane in ((NOOP, "json"), (NOOP, "binary"), (SHIPPED, "binary")):
        ours = Key("sluice", model, lane, loop="open")
        text = f"{model}, {lane}: p99 at 80 % of peak"
        yield _with_failures(results, Verdict(text, 100.0, False, over_rounds(results, ours, p99_ms), " ms"), ours)


def _falling_cost(results: Results) -> Verdict:
    """The gateway's CPU per request at the most connections over that at one."""
    gateway = {row["connections"]: row["cpu_ms"].get("gateway") for row in results.get("sweep", ()) if "cpu_ms" in row}
    first, last = gateway.get(1), gateway.get(max(gateway, default=1))
    measured = spread([last / first]) if first and last and len(gateway) > 1 else None
    return Verdict("gateway's CPU per request, at most connections over at one", 1.0, False, measured)


def _faster(results: Results, text: str, limit: float, ours: Key, theirs: Key | None) -> Verdict:
    measured = None if theirs is None else ratio(results, ours, theirs, rps)
    note = "" if theirs is None else f"{theirs.system}, {theirs.lane}"
    return _with_failures(results, Verdict(text, limit, True, measured, note=note), ours)


def _with_failures(results: Results, verdict: Verdict, key: Key) -> Verdict:
    return replace(verdict, failed=round(sum(map(n_failed, by_round(results, key).values()))))


def _best(results: Results, candidates: Sequence[Key]) -> Key | None:
    """The fastest by its median, of those that were measured."""

    def median_rps(key: Key) -> float:
        found = over_rounds(results, key, rps)
        return -math.inf if found is None else found.median

    best = max(candidates, key=median_rps)
    return best if by_round(results, best) else None
