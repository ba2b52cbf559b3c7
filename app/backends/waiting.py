"""The queue before a backend: fair between principals, apart by what a group must have in common."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue needs to know of its items.

    Attributes:
        key: What all items of a group have in common.
        principal: Whose it is.
        n_windows: How much work it is.
    """

    @property
    def key(self) -> Hashable: ...
    @property
    def principal(self) -> str: ...
    @property
    def n_windows(self) -> int: ...


Item = TypeVar("Item", bound=Waiting)


class FairQueue(Generic[Item]):
    """Items that wait for their turn.

    Start-time fair queueing (Goyal, Vin and Cheng 1996), with a window as the unit of work: an item's start tag is the
    larger of the queue's virtual time and the end of its principal's last item, and the smallest tag goes first. Who
    asks alone gets everything; among several, who sends a thousand windows waits behind its own, not others' turn.

    Attributes:
        n_windows: Windows that wait.
    """

    def __init__(self) -> None:
        self.n_windows = 0
        # By key, then by principal: start tags by item, in order; an item that gives up leaves at once.
        self._lanes: dict[Hashable, dict[str, OrderedDict[Item, int]]] = {}
        self._virtual_time = 0
        self._due = 0  # windows with tags up to the virtual time
        self._later: Counter[int] = Counter()  # all others, by tag
        self._waiting: Counter[str] = Counter()  # windows by principal
        self._ends: dict[str, int] = {}  # end of each principal's last item, in virtual time

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[Item]:
        return (item for lane in self._lanes.values() for items in lane.values() for item in items)

    def put(self, item: Item) -> None:
        start = self._start_of(item.principal)
        self._ends[item.principal] = start + item.n_windows
        self._waiting[item.principal] += item.n_windows
        self._lanes.setdefault(item.key, {}).setdefault(item.principal, OrderedDict())[item] = start
        self._count(item.n_windows, start)

    def ahead_of(self, principal: str) -> int:
        """About how many windows would go before an item of this principal that came now: at most all that wait.

        What is due goes first, however many principals share it; then every principal that waits gets as much done as
        this one until its turn.
        """
        turns = (self._start_of(principal) - self._virtual_time) * len(self._waiting)
        return min(self.n_windows, max(self._due, turns))

    def discard(self, item: Item) -> None:
        """Take the item out, if it still waits; it counts as if it had never come."""
        if item in self._lanes.get(item.key, {}).get(item.principal, ()):
            self._ends[item.principal] -= item.n_windows
            self._remove(item)

    def take(self, max_windows: int) -> list[Item]:
        """The next group: items of one key in the order of their turns, as many as fit, or one that is too large."""
        taken: list[Item] = []
        if not self._lanes:
            return taken
        lane = min(self._lanes.values(), key=_first_tag)
        room = max_windows
        while lane:
            item, start = _next(lane)
            if taken and item.n_windows > room:
                break
            room -= item.n_windows
            self._advance(start)
            self._remove(item)
            taken.append(item)
        return taken

    def _start_of(self, principal: str) -> int:
        return max(self._virtual_time, self._ends.get(principal, 0))

    def _advance(self, virtual_time: int) -> None:
        """Move virtual time on, never back: a lane that was passed over has older tags."""
        for tag in range(self._virtual_time + 1, virtual_time + 1):
            self._due += self._later.pop(tag, 0)
        self._virtual_time = max(self._virtual_time, virtual_time)

    def _count(self, n_windows: int, tag: int) -> None:
        """So many windows of this tag came, or left where the number is negative."""
        self.n_windows += n_windows
        if tag <= self._virtual_time:
            self._due += n_windows
        else:
            self._later[tag] += n_windows

    def _remove(self, item: Item) -> None:
        lane = self._lanes[item.key]
        items = lane[item.principal]
        self._count(-item.n_windows, items.pop(item))
        if not items:
            del lane[item.principal]
        if not lane:
            del self._lanes[item.key]
        self._waiting[item.principal] -= item.n_windows
        if not self._waiting[item.principal]:
            self._forget(item.principal)

    def _forget(self, principal: str) -> None:
        """The principal waits no more; what it had ahead of its share is remembered until others had it too."""
        del self._waiting[principal]
        if self._ends[principal] <= self._virtual_time:
            del self._ends[principal]
        if not self._waiting:
            self._virtual_time = 0
            self._later.clear()
            self._ends.clear()
        elif len(self._ends) > 2 * len(self._waiting) + 64:  # now and then, so that the cost per item stays the same
            self._ends = {
                name: end for name, end in self._ends.items() if end > self._virtual_time or name in self._waiting
            }


def _next(lane: dict[str, OrderedDict[Item, int]]) -> tuple[Item, int]:
    """The item of a lane whose turn it is, and its start tag."""
    heads = (next(iter(items.items())) for items in lane.values())
    return next(heads) if len(lane) == 1 else min(heads, key=_tag)


def _first_tag(lane: dict[str, OrderedDict[Item, int]]) -> int:
    return _next(lane)[1]


def _tag(head: tuple[Item, int]) -> int:
    return head[1]
