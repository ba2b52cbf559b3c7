"""The fair queue: whose turn it is, and what one principal can do to another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from app.backends.waiting import FairQueue


@dataclass(eq=False)
class Item:
    principal: str
    n_windows: int = 1
    key: str = "default"


def queue_of(*items: Item) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue()
    for item in items:
        queue.put(item)
    return queue


def test_one_principal_is_served_in_the_order_of_arrival() -> None:
    items = [Item("a") for _ in range(5)]
    assert queue_of(*items).take(3) == items[:3]


def test_principals_take_turns_by_windows_and_not_by_calls() -> None:
    queue = queue_of(*(Item("small", 1) for _ in range(40)), *(Item("large", 8) for _ in range(5)))
    served: Counter[str] = Counter()
    for item in queue.take(32):
        served[item.principal] += item.n_windows
    assert served == {"small": 16, "large": 16}


def test_a_newcomer_goes_before_the_backlog_of_another() -> None:
    queue = queue_of(*(Item("flood") for _ in range(100)))
    queue.take(10)
    newcomer = Item("quiet")
    queue.put(newcomer)
    assert newcomer in queue.take(2)


def test_a_principal_that_was_away_has_not_saved_up_turns() -> None:
    queue = queue_of(*(Item("busy") for _ in range(50)))
    queue.take(40)
    for _ in range(10):
        queue.put(Item("back"))
    served = Counter(item.principal for item in queue.take(8))
    assert served == {"busy": 4, "back": 4}


def test_keys_are_never_mixed_and_the_lane_whose_turn_came_first_goes_first() -> None:
    first, other, same = Item("a", key="x"), Item("a", key="y"), Item("a", key="x")
    queue = queue_of(first, other, same)
    assert queue.take(8) == [first, same]
    assert queue.take(8) == [other]
    assert not queue
    assert queue.take(8) == []


def test_an_item_that_does_not_fit_is_not_overtaken() -> None:
    small, large, later = Item("a", 2), Item("a", 3), Item("a", 1)
    assert queue_of(small, large, later).take(4) == [small]


def test_a_discarded_item_is_gone_and_discarding_twice_does_nothing() -> None:
    gone, stays = Item("a"), Item("a")
    queue = queue_of(gone, stays)
    queue.discard(gone)
    queue.discard(gone)
    assert (queue.n_windows, queue.take(8)) == (1, [stays])


def test_what_is_ahead_of_a_newcomer_is_nothing_and_of_the_flood_its_own_backlog() -> None:
    queue = queue_of(*(Item("flood") for _ in range(101)))
    queue.take(1)
    assert (queue.ahead_of("quiet"), queue.ahead_of("flood")) == (0, 100)
    queue.put(Item("quiet", 4))
    assert queue.ahead_of("quiet") == 8  # four of its own and as many of the flood's


def test_many_principals_with_little_each_are_ahead_of_a_newcomer_together() -> None:
    items = [Item(f"principal {number}", 4) for number in range(50)]
    queue = queue_of(*items)
    assert queue.ahead_of("newcomer") == 200
    queue.take(80)
    queue.discard(items[-1])
    assert queue.ahead_of("newcomer") == queue.n_windows == 116


def test_principals_that_have_left_are_forgotten() -> None:
    queue = queue_of(Item("stays", 10_000))
    for number in range(1000):
        passing = Item(f"passing {number}")
        queue.put(passing)
        queue.discard(passing)
    assert len(queue._ends) < 200


def test_a_principal_that_waits_is_not_forgotten_when_another_lane_runs_ahead_of_it() -> None:
    passing = [Item(f"passing {number}") for number in range(70)]
    waits = Item("waits", key="other")
    queue = queue_of(*passing, *(Item("runs ahead") for _ in range(26)), waits)
    taken = [item for _ in range(3) for item in queue.take(32)]
    assert waits not in taken
    assert queue.take(32) == [waits]


def test_a_lane_that_was_passed_over_does_not_turn_back_the_turns_of_the_others() -> None:
    queue = queue_of(*(Item("busy") for _ in range(40)), Item("passed over", key="other"))
    queue.take(32)
    queue.take(32)
    for _ in range(40):
        queue.put(Item("newcomer"))
    served = Counter(item.principal for item in queue.take(16))
    assert served == {"newcomer": 8, "busy": 8}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.sampled_from("xy"), st.booleans()), max_size=60),
    st.integers(1, 32),
)
def test_every_item_comes_out_exactly_once_and_groups_keep_to_their_size(
    arrivals: list[tuple[str, int, str, bool]], room: int
) -> None:
    queue: FairQueue[Item] = FairQueue()
    put, taken = [], []
    for principal, size, key, take in arrivals:
        put.append(Item(principal, size, key))
        queue.put(put[-1])
        if take:
            taken.append(queue.take(room))
    while queue:
        taken.append(queue.take(room))
    assert all(len(group) == 1 or sum(item.n_windows for item in group) <= room for group in taken)
    assert all(len({item.key for item in group}) <= 1 for group in taken)
    assert Counter(map(id, (item for group in taken for item in group))) == Counter(map(id, put))
    assert queue.n_windows == queue.ahead_of("newcomer") == 0
    assert queue._due == 0
