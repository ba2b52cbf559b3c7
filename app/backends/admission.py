"""Who may wait for a backend and how much is sent at once, judged by the pace at which its answers come."""

from __future__ import annotations

from serve_app.contract import Overloaded

# Nobody is refused for a wait as short as this: a burst is no overload.
SHORT_WAIT_S = 0.1


class Pace:
    """How long the backend takes for a window while it has all the work it can hold; idle times say nothing.

    Attributes:
        s_per_window: Seconds from one window's landing to the next's, over the last ten groups or so; 0 until known.
    """

    _KEPT = 0.9  # of the past, at each landing

    def __init__(self) -> None:
        self.s_per_window = 0.0
        self._busy_s = 0.0
        self._windows = 0.0
        self._since = 0.0

    def mark(self, now: float) -> None:
        """The next window's time begins: the first group leaves after a pause, or one has come back."""
        self._since = now

    def land(self, n_windows: int, sent: float, now: float, *, is_saturated: bool) -> None:
        """A group is back with its answer, and others waited for its slot or did not."""
        if is_saturated:
            self._busy_s = self._KEPT * self._busy_s + now - self._since
            self._windows = self._KEPT * self._windows + n_windows
            self.s_per_window = self._busy_s / self._windows
        # A window cannot take longer than the group's whole way: one quick answer ends the memory of slow times.
        self.s_per_window = min(self.s_per_window, (now - sent) / n_windows)
        self._busy_s = self.s_per_window * self._windows


class Admission:
    """Bounds of the queue and of the groups, in windows and in time.

    Nobody waits for longer than what is sent is on its way: more would only double the answers' age again, as the
    backend has all the work that it can hold. So a slow backend has a long queue and a quick one a short one.

    Args:
        pace: At which windows are answered.
        max_group_windows: Most windows in one group.
        max_queued_windows: Most windows that wait before a call and with it; twice as many wait in all.
        max_wait_s: Longest wait that anybody is admitted to, however long the way is.
    """

    def __init__(self, pace: Pace, *, max_group_windows: int, max_queued_windows: int, max_wait_s: float) -> None:
        if max_queued_windows < max_group_windows:
            raise ValueError("max_queued_windows must hold at least one group")
        self._pace = pace
        self._max_group_windows = max_group_windows
        self._max_queued_windows = max_queued_windows
        self._max_wait_s = max_wait_s

    def refuse_overload(
        self,
        n_windows: int,
        budget_s: float,
        *,
        ahead: int,
        queued: int,
        flying: int,
        slots: int,
        is_last_resort: bool = False,
    ) -> None:
        """Raise `Overloaded` for a call that the queue has no room for, or no time.

        Args:
            n_windows: Windows of the call.
            budget_s: Seconds to its deadline.
            ahead: Windows that go before it, of `queued` that wait.
            flying: Windows under way.
            slots: Groups that may be under way at a time.
            is_last_resort: Another arm has failed the call; when an arm fails, all that it held comes here at once, and
                is no overload.
        """
        room = self._max_queued_windows
        if ahead + n_windows > room or queued + n_windows > 2 * room:
            raise Overloaded("too many windows are waiting")
        # Who finds nobody ahead is let in: such answers, and nothing else, can tell that the pace has changed.
        if ahead:
            s_per_window = self._pace.s_per_window
            wait_s = s_per_window * ahead
            longest_s = self._max_wait_s if is_last_resort else self.longest_wait_s(slots)
            if wait_s > longest_s or wait_s + s_per_window * flying > budget_s:
                raise Overloaded("the wait would be too long")

    def longest_wait_s(self, slots: int) -> float:
        """Seconds that a call may wait: as long as all slots' groups take, or a short while."""
        way_s = self._pace.s_per_window * slots * self.group_windows(slots)
        return min(max(way_s, SHORT_WAIT_S), self._max_wait_s)

    def group_windows(self, slots: int) -> int:
        """Windows for the next group: at the present pace, all slots hold work for half of `max_wait_s` at most.

        What is under way cannot be overtaken any more, so a slow model gets smaller groups; down to one full group
        over all slots, because a pass that takes long whatever its size would only get slower per window.
        """
        slot_s = self._max_wait_s / 2 / slots
        fitting = self._max_group_windows
        if self._pace.s_per_window * fitting > slot_s:
            fitting = int(slot_s / self._pace.s_per_window)
        return max(fitting, self._max_group_windows // slots, 1)
