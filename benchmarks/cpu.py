"""CPU time of a system's processes, read from /proc."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from app.local_ray import descendants

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# A process id may come again; its start time with it never does.
Process = tuple[int, int]
Role = Callable[[int, str], str]


def family(roots: Iterable[int]) -> list[int]:
    """The given processes and everything below them, each once."""
    return list(dict.fromkeys(pid for root in roots for pid in (root, *descendants(root))))


def used_s(pids: Iterable[int]) -> dict[Process, float]:
    """User and system CPU seconds of each process so far (proc(5), `stat`); those that have ended are left out."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid, int(fields[19])] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found


def machine_busy_s() -> float:
    """CPU seconds that all cores together have been busy, or were taken by the hypervisor (proc(5), `/proc/stat`)."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def command_of(pid: int) -> str:
    """The command line, or what the process calls itself; empty once it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def spent_by_role(before: dict[Process, float], after: dict[Process, float], role: Role) -> dict[str, float]:
    """CPU seconds between two readings, by role; a process that came in between counts from its start.

    Args:
        before, after: What `used_s` returned.
        role: Names the role of a process by its id and command line.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    for process, seconds in after.items():
        spent[role(process[0], command_of(process[0]))] += seconds - before.get(process, 0.0)
    return {name: round(seconds, 4) for name, seconds in sorted(spent.items())}
