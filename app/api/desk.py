"""Where the experiment's log is read and labelled, on threads of its own.

To judge a full log takes seconds, and SQLite may have a writer wait for another one. The threads that everything else
shares store the rollout, record changes and look for kills: a few who ask for reports must not have them all.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from app.api.recent import Recent
from app.errors import StateUnavailable
from app.rollout.experiment_log import AssignmentLog, Labelled, Outcome
from app.rollout.experiment_report import report
from serve_app.contract import DeadlineExceeded

_LOGGER = logging.getLogger(__name__)

GOOD_S = 5.0  # reports that are asked for one after the other are one
MAX_REPORTS = 4
_MAX_LABELLING = 16
_REPORT_TIMEOUT_S = 30.0
_LABEL_TIMEOUT_S = 10.0

_T = TypeVar("_T")


class Desk:
    """Makes one report after the other, and writes one list of outcomes after the other.

    Args:
        log: What is read and labelled.
        clock: Monotonic seconds.
        report_timeout_s: Longest wait for a report, that for the reports of others included.
    """

    def __init__(
        self, log: AssignmentLog, *, clock: Callable[[], float], report_timeout_s: float = _REPORT_TIMEOUT_S
    ) -> None:
        self._log = log
        self._clock = clock
        self._report_timeout_s = report_timeout_s
        self._judging = _Thread("experiment-report", MAX_REPORTS)
        self._labelling = _Thread("experiment-label", _MAX_LABELLING)
        self._reports: OrderedDict[float, Recent[dict[str, Any]]] = OrderedDict()

    async def start(self) -> None:
        """The threads begin when there is something to do."""

    async def stop(self) -> None:
        self._judging.stop()
        self._labelling.stop()

    async def label(self, outcomes: Sequence[Outcome]) -> Labelled:
        """Join outcomes with what was answered; telling the same twice changes nothing.

        Raises:
            StateUnavailable: The log cannot be written, or too many wait to write; nothing was stored.
            DeadlineExceeded: It took too long, and they may have been stored.
        """
        return await _within(_LABEL_TIMEOUT_S, self._labelling.do(partial(self._log.label, outcomes)))

    async def report(self, since: float) -> dict[str, Any]:
        """The report over requests from `since` seconds after the epoch on, JSON-ready; at most `GOOD_S` old.

        Raises:
            StateUnavailable: The log cannot be read, or too many other reports are asked for.
            DeadlineExceeded: It took too long; it is made all the same, for who asks again.
        """
        return await _within(self._report_timeout_s, self._recent(since)())

    def _recent(self, since: float) -> Recent[dict[str, Any]]:
        recent = self._reports.pop(since, None) or Recent(partial(self._judge, since), keep_s=GOOD_S, clock=self._clock)
        self._reports[since] = recent
        if len(self._reports) > MAX_REPORTS:
            self._reports.popitem(last=False)
        return recent

    async def _judge(self, since: float) -> dict[str, Any]:
        try:
            return await self._judging.do(lambda: report(self._log.read(since), since).document())
        except BaseException:
            self._reports.pop(since, None)  # a failure is nothing to keep
            raise


class _Thread:
    """One thread, for which a few may wait.

    Args:
        name: Of the thread.
        max_waiting: Those who wait for what they asked of it.
    """

    def __init__(self, name: str, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._max_waiting = max_waiting
        self._waiting = 0

    async def do(self, ask: Callable[[], _T]) -> _T:
        """What the log says. Raises `StateUnavailable`."""
        if self._waiting >= self._max_waiting:
            raise StateUnavailable("too many ask for the experiment's log; try again")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, ask)
        except (sqlite3.Error, OSError) as error:
            _LOGGER.warning("the experiment's log could not be used: %s", error)
            raise StateUnavailable("the experiment's log could not be used; try again") from None
        finally:
            self._waiting -= 1

    def stop(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


async def _within(timeout_s: float, work: Awaitable[_T]) -> _T:
    """Raises `DeadlineExceeded`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise DeadlineExceeded from None
