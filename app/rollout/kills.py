"""What is killed and what no longer is: a table of entries of which, for each name, the last word counts.

Tables of several gateways are merged entry by entry, in any order and as often as one likes, and all come to the same.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

Scope = Literal["global", "model", "principal", "symbol"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

MAX_KILLS = 1000
MAX_TABLE_BYTES = 4 << 20
MAX_REASON_CHARS = 200
KEEP_LIFTED_S = 7 * 86_400.0
_LIFTED_AT_LEAST = 100

_NAMES: Mapping[Scope, re.Pattern[str]] = {
    "global": re.compile(""),
    "model": re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}"),
    "principal": re.compile(r"(sub|tenant):[^\x00-\x1f\x7f]{1,255}"),
    "symbol": re.compile(r"[A-Z0-9._-]{1,32}"),
}
_MAX_AT = 1e11  # seconds since the epoch; past every clock


def check_name(scope: Scope, name: str) -> None:
    """Raises `ValueError` for a name that nothing of this scope can have."""
    if scope not in SCOPES or not _NAMES[scope].fullmatch(name) or not (name == "" or name.isprintable()):
        raise ValueError("nothing has such a name")


class Key(NamedTuple):
    """What an entry is about."""

    scope: Scope
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One word on one name.

    Attributes:
        scope: What kind of name it is.
        name: A model's, an account (`sub:NAME`, `sub:TENANT/NAME` or `tenant:NAME`), a symbol tag; empty for `global`.
        killed: Whether it is killed, or lifted.
        actor: Subject of who said so, 1 to 255 printable characters.
        reason: Why, 1 to 200 printable characters.
        at: Seconds since the epoch.

    Raises:
        ValueError: One of them is none of these.
    """

    scope: Scope
    name: str
    killed: bool
    actor: str
    reason: str
    at: float

    def __post_init__(self) -> None:
        check_name(self.scope, self.name)
        if not _is_line(self.actor) or len(self.actor) > 255:
            raise ValueError("the actor must have 1 to 255 printable characters")
        if not _is_line(self.reason) or len(self.reason) > MAX_REASON_CHARS:
            raise ValueError(f"the reason must have 1 to {MAX_REASON_CHARS} printable characters")
        if not 0 <= self.at < _MAX_AT:  # false for NaN too
            raise ValueError("no clock shows such a time")

    @property
    def key(self) -> Key:
        return Key(self.scope, self.name)

    @property
    def weight(self) -> tuple[float, bool, str, str]:
        """Of two entries of one name the one of more weight counts: the later, and a kill rather than a lift."""
        return self.at, self.killed, self.actor, self.reason


class Kills:
    """A table of entries, one per name; it never changes, and merging gives another one.

    Args:
        entries: In any order, of one name the weightiest counts.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[Key, Entry] = {}
        for entry in entries:
            known = self._entries.get(entry.key)
            if known is None or entry.weight > known.weight:
                self._entries[entry.key] = entry

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kills) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]  # nobody needs it

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def killed(self) -> list[Entry]:
        """What is killed, oldest first."""
        return sorted((entry for entry in self if entry.killed), key=lambda entry: entry.weight)

    def lifted(self) -> list[Entry]:
        """What is not killed any more, oldest first; remembered so that an older kill of another gateway cannot win."""
        return sorted((entry for entry in self if not entry.killed), key=lambda entry: entry.weight)

    def counts(self) -> dict[str, int]:
        """How many kills there are of each scope."""
        counts = Counter(entry.scope for entry in self if entry.killed)
        return {scope: counts[scope] for scope in SCOPES}

    def beyond(self, other: Kills) -> list[Entry]:
        """The entries by which this table would change the other."""
        return [
            entry for entry in self if (known := other._entries.get(entry.key)) is None or entry.weight > known.weight
        ]

    def merged(self, other: Iterable[Entry], now_s: float) -> Kills:
        """Both tables in one, without lifts that are a week old, nor the oldest ones where there are too many.

        Args:
            other: Entries, in any order.
            now_s: Seconds since the epoch.
        """
        table = Kills((*self, *other))
        recent = [entry for entry in table.lifted() if entry.at > now_s - KEEP_LIFTED_S]
        killed = table.killed()
        room = max(_LIFTED_AT_LEAST, MAX_KILLS - len(killed))  # or a full table's kills could never be lifted
        return Kills((*killed, *recent[-room:]))


def format_kills(kills: Kills) -> bytes:
    """The text that `parse_kills` reads."""
    entries = [asdict(entry) for entry in sorted(kills, key=lambda entry: entry.key)]
    return json.dumps({"entries": entries}, indent=1).encode() + b"\n"


def parse_kills(text: bytes) -> Kills:
    """Read a table. Raises `ValueError` for anything else, and for a table with one wrong entry."""
    if len(text) > MAX_TABLE_BYTES:
        raise ValueError("it is too large")
    try:
        document = json.loads(text)
    except (RecursionError, UnicodeDecodeError):
        raise ValueError("it is no JSON") from None
    match document:
        case {"entries": list(entries)} if len(document) == 1:
            return Kills(map(_parse_entry, entries))
    raise ValueError("it is no table of kills")


def _parse_entry(document: Any) -> Entry:
    match document:
        case {
            "scope": str(scope),
            "name": str(name),
            "killed": bool(killed),
            "actor": str(actor),
            "reason": str(reason),
            "at": int() | float() as at,
        } if len(document) == 6 and not isinstance(at, bool) and math.isfinite(at):
            return Entry(scope, name, killed, actor, reason, float(at))  # type: ignore[arg-type]  # it looks itself
    raise ValueError("it holds something that is no entry")


def _is_line(text: str) -> bool:
    return text != "" and text.isprintable()
