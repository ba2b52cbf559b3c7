"""The contract, as rules over the ledger: each says what was seen, and whether the promise was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tests.faults.scenario import GRACE_S, Evidence, Finding, Promise, answer_of, is_late, is_lost
from tests.integration.open_loop import Load, Result, percentile_ms

# A machine with two busy cores stands still now and then; what breaks the promise does so more often.
LATE_SHARE = 0.005
IN_A_ROW = 5


def nothing_lost(evidence: Evidence) -> Finding:
    """One whole answer for each request, none of them a fault of ours."""
    lost = [result for result in evidence.desks.results if is_lost(result)]
    kinds = Counter(f"{answer_of(result)} on a {result.connection} connection" for result in lost)
    seen = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    said = f"{len(lost)} of {len(evidence.desks.results)} lost" + (f": {seen}" if seen else "")
    return Finding(bool(evidence.desks.results) and not lost, said)


def in_time(evidence: Evidence) -> Finding:
    """Each answer within its deadline and 50 ms."""
    results = evidence.desks.results
    late = [result.answer_s for result in results if is_late(result) and not is_lost(result)]
    most = f", {max(late):.2f} s at most" if late else ""
    said = f"{len(late)} of {len(results)} later than the deadline and 50 ms{most}"
    return Finding(bool(results) and len(late) <= LATE_SHARE * len(results), said)


def all_answered(*statuses: int) -> list[Promise]:
    """The contract of every request, and one of these statuses for each."""
    return [nothing_lost, in_time, only(*statuses)]


def only(*statuses: int, since: str | None = None, until: str | None = None, skip_s: float = 0.0) -> Promise:
    """No other answers, in all or between two steps."""

    def judge(evidence: Evidence) -> Finding:
        load = evidence.since(since, until, skip_s=skip_s) if since else evidence.desks
        others = [result for result in load.results if result.status not in statuses]
        place = f" after {since}" if since else ""
        seen = ", ".join(f"{count} {kind}" for kind, count in Counter(map(answer_of, others)).items())
        said = f"{len(load.results) - len(others)} of {len(load.results)}{place} answered {_or(statuses)}"
        return Finding(bool(load.results) and not others, said + (f", beside {seen}" if seen else ""))

    return judge


def from_arm(arm: str, *, since: str | None = None, until: str | None = None, share: float = 1.0) -> Promise:
    """At least this share of the answered ones came from the arm."""

    def judge(evidence: Evidence) -> Finding:
        load = evidence.since(since, until) if since else evidence.desks
        arms = Counter(result.arm for result in load.answered)
        said = f"{arms[arm]} of {arms.total()} answers from {arm}" + (f" after {since}" if since else "")
        return Finding(bool(arms) and arms[arm] >= share * arms.total(), said)

    return judge


def recovers(
    after: str,
    within_s: float,
    good: Callable[[Result], bool] | None = None,
    what: str = "answers again",
    *,
    once: Callable[[Result], bool] | None = None,
) -> Promise:
    """Good answers, several in a row, begin so soon after the end of a step; and `once` has been true before them."""
    is_good = good or (lambda result: result.status == 200)

    def judge(evidence: Evidence) -> Finding:
        moment = evidence.happened[after].ended
        if once is not None and not any(result.due >= moment and once(result) for result in evidence.desks.results):
            return Finding(False, f"{after} did not show")
        seconds = recovery_s(evidence.desks, moment, is_good, once)
        said = f"{what} {seconds:.1f} s after {after}" if seconds is not None else f"never {what} after {after}"
        return Finding(seconds is not None and seconds <= within_s, f"{said} (at most {within_s:g})", seconds)

    return judge


def recovery_s(
    load: Load,
    moment: float,
    good: Callable[[Result], bool],
    once: Callable[[Result], bool] | None = None,
) -> float | None:
    """Seconds from a moment to the first of several good answers in a row; None where there are none."""
    row: list[Result] = []
    has_shown = once is None
    for result in load.results:
        if result.due < moment:
            continue
        has_shown = has_shown or (once is not None and once(result))
        if not has_shown:
            continue
        row = [*row, result] if good(result) else []
        if len(row) == IN_A_ROW:
            return max(0.0, row[0].ended - moment)
    return None


def by_ray(result: Result) -> bool:
    return result.status == 200 and result.arm == "ray_serve"


def by_legacy(result: Result) -> bool:
    return result.status == 200 and result.arm == "legacy"


def refused_quickly(since: str, until: str | None, within_ms: float, *, skip_s: float, percent: float = 95) -> Promise:
    """Refusals of the time between are 503, say when to come back, and nearly all come this soon."""

    def judge(evidence: Evidence) -> Finding:
        results = evidence.since(since, until, skip_s=skip_s).results
        refused = [result for result in results if result.status == 503]
        quick_ms = percentile_ms((result.answer_s for result in refused), percent)
        told = all(result.retry_after and int(result.retry_after) >= 1 for result in refused)
        said = f"{len(refused)} of {len(results)} refused with 503, {percent:g} % of them within {quick_ms:.0f} ms"
        return Finding(bool(refused) and told and quick_ms <= within_ms, f"{said} (at most {within_ms:g})")

    return judge


def shows(since: str, until: str) -> Promise:
    """The fault did something: not everything was answered 200 without help meanwhile."""

    def judge(evidence: Evidence) -> Finding:
        results = evidence.since(since, until).results
        hit = [result for result in results if result.status != 200 or "x-fallback" in result.headers]
        return Finding(bool(hit), f"{len(hit)} of {len(results)} felt {since}")

    return judge


def probe_says(
    probe: str, status: int, since: str, until: str | None = None, *, skip_s: float = 0.0, before_s: float = 0.0
) -> Promise:
    """A probe of health gave this status all the time between, from `skip_s` after the first to `before_s` before."""

    def judge(evidence: Evidence) -> Finding:
        load = evidence.probed(probe, since, until, skip_s=skip_s)
        end = evidence.happened[until].ended - before_s if until else float("inf")
        seen = Counter(result.status for result in load.results if result.due < end)
        said = f"/health/{probe} said {_counts(seen)} after {since} (promised {status})"
        return Finding(bool(seen) and set(seen) == {status}, said)

    return judge


def probe_once_says(probe: str, status: int, since: str, until: str) -> Promise:
    """A probe of health gave this status between the two, at one time at least: how soon is the breaker's matter."""

    def judge(evidence: Evidence) -> Finding:
        seen = Counter(result.status for result in evidence.probed(probe, since, until).results)
        said = f"/health/{probe} said {_counts(seen)} after {since} (promised {status} among them)"
        return Finding(status in seen, said)

    return judge


def probes_quick(probe: str, within_ms: float, percent: float = 99) -> Promise:
    def judge(evidence: Evidence) -> Finding:
        quick_ms = percentile_ms((result.answer_s for result in evidence.probes.of(probe).results), percent)
        return Finding(quick_ms <= within_ms, f"/health/{probe} p{percent:g} {quick_ms:.0f} ms (at most {within_ms:g})")

    return judge


def slowest_within(within_s: float, percent: float = 99) -> Promise:
    """Hardly an answer took longer."""

    def judge(evidence: Evidence) -> Finding:
        slow_ms = percentile_ms((result.answer_s for result in evidence.desks.results), percent)
        said = f"p{percent:g} of every answer {slow_ms:.0f} ms (at most {1e3 * within_s:g} and 50)"
        return Finding(slow_ms <= 1e3 * (within_s + GRACE_S), said)

    return judge


def quick_but_for(count: int, since: str, until: str | None, *, over_ms: float) -> Promise:
    """No more requests than so many took longer, beside as many as did so before the fault in as many requests."""

    def judge(evidence: Evidence) -> Finding:
        before = evidence.desks.between(evidence.desks.began, evidence.happened[since].began).results
        during = evidence.since(since, until).results
        usual = sum(1e3 * result.answer_s > over_ms for result in before) / max(1, len(before))
        slow = sum(1e3 * result.answer_s > over_ms for result in during)
        allowed = count + (usual + LATE_SHARE) * len(during)
        said = f"{slow} of {len(during)} took over {over_ms:g} ms after {since}"
        return Finding(
            bool(during) and slow <= allowed,
            f"{said} (at most {count}, and what the machine does: {allowed - count:.0f})",
        )

    return judge


def of_stream(name: str, promise: Promise) -> Promise:
    """The promise, about one stream alone."""

    def judge(evidence: Evidence) -> Finding:
        finding = promise(replace(evidence, desks=evidence.desks.of(name)))
        return finding._replace(said=f"{name}: {finding.said}")

    return judge


def versions_are(expected: set[str]) -> Promise:
    """No other version answered."""

    def judge(evidence: Evidence) -> Finding:
        seen = Counter(result.version for result in evidence.desks.answered)
        return Finding(set(seen) == expected, "versions that answered: " + ", ".join(sorted(seen)))

    return judge


def supervisor_lives(evidence: Evidence) -> Finding:
    """The process that replaces workers was there to the end."""
    alive = evidence.floor.gateway.is_alive()
    return Finding(alive, "the gateway's process lives" if alive else "the gateway's process has ended")


def gateway_lives(evidence: Evidence) -> Finding:
    """Its process was there to the end, and so were the workers of the beginning: none was replaced."""
    lives = supervisor_lives(evidence)
    before, now = evidence.floor.notes.get("workers"), evidence.floor.notes.get("workers at the end")
    kept = lives.kept and bool(before) and before == now
    return Finding(kept, f"{lives.said}; its workers {before}, {now} at the end")


def noted(name: str, expected: Callable[[object], bool], said: str) -> Promise:
    """A figure that an action took down is as expected; `{}` in what is said stands for it."""

    def judge(evidence: Evidence) -> Finding:
        value = evidence.floor.notes.get(name)
        if value is None:
            return Finding(False, f"nobody took down: {name}")
        return Finding(expected(value), said.format(value))

    return judge


def at_most(name: str, limit: float, said: str) -> Promise:
    """A figure that an action took down is no greater."""
    return noted(name, lambda value: isinstance(value, int | float) and value <= limit, said)


def _or(statuses: tuple[int, ...]) -> str:
    return " or ".join(map(str, statuses))


def _counts(seen: Counter[int]) -> str:
    return ", ".join(f"{status} {count} times" for status, count in seen.most_common()) or "nothing"
