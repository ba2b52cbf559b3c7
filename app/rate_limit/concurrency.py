"""How many requests of one account may be under way at a time."""

from __future__ import annotations

from app.errors import TooManyAtOnce


class Concurrency:
    """Counts what is under way, for the accounts that have something under way and no others.

    Args:
        limit: Requests of one account at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.under_way: dict[str, int] = {}

    def place(self, account: str) -> Place:
        """A block within which one more request of the account is under way; entering raises `TooManyAtOnce`."""
        return Place(self, account)


class Place:
    """One request's place among those of its account, given back however the block ends."""

    __slots__ = ("_account", "_concurrency")

    def __init__(self, concurrency: Concurrency, account: str) -> None:
        self._concurrency = concurrency
        self._account = account

    def __enter__(self) -> None:
        under_way = self._concurrency.under_way
        count = under_way.get(self._account, 0)
        if count >= self._concurrency.limit:
            raise TooManyAtOnce(
                f"{self._concurrency.limit} requests at a time are your limit here; wait for one of them",
                headers={"Retry-After": "1"},
                members={"violated-policies": ["concurrency"]},
            )
        under_way[self._account] = count + 1

    def __exit__(self, *_: object) -> None:
        under_way = self._concurrency.under_way
        left = under_way[self._account] - 1
        if left:
            under_way[self._account] = left
        else:
            del under_way[self._account]
