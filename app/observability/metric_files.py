"""The files in which several workers add up their metrics: read as a whole, and folded when a worker has ended."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_ADDED_UP = ("counter", "histogram")


def read_metrics(folder: Path) -> bytes:
    """The text that Prometheus scrapes, over all workers; takes some ms for each and may wait for `forget_worker`."""
    registry = CollectorRegistry()
    with _locked(folder, fcntl.LOCK_SH):
        MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_worker(folder: Path, pid: int) -> None:
    """Let what an ended worker showed go, and keep what it counted, in files that all ended workers share.

    However many workers come and go, the files stay few. A worker that left no files, or is already forgotten, is
    none.
    """
    with _locked(folder, fcntl.LOCK_EX):
        mark_process_dead(pid, path=str(folder))  # type: ignore[no-untyped-call]
        for kind in _ADDED_UP:
            ended = folder / f"{kind}_{pid}.db"
            if ended.exists():
                _add(ended, folder / f"{kind}_ended.db")
                ended.unlink()


def _add(source: Path, target: Path) -> None:
    sums = MmapedDict(str(target))  # type: ignore[no-untyped-call]
    try:
        for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(str(source)):  # type: ignore[no-untyped-call]
            sums.write_value(key, sums.read_value(key)[0] + value, timestamp)  # type: ignore[no-untyped-call]
    finally:
        sums.close()  # type: ignore[no-untyped-call]


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Keep a scrape from seeing a worker's counts twice, or not at all, which would look like a fresh start."""
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, kind)
        yield
