"""Processes that a benchmark starts, and their certain end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from benchmarks.cpu import family
from benchmarks.request import HOST

_END_TIMEOUT_S = 2.0


class NotUp(Exception):
    """A system did not come up; the message is one line."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], *, folder: Path, environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, so that Ctrl-C ends us first and we end it, with everything below it.

    Args:
        command: What is run; the kernel kills it should we be killed ourselves.
        folder: Its working folder.
        environment: Added to ours.
        log: File for all that it says.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything below it: asked first, killed after a moment."""
    pids = family([process.pid])
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_TIMEOUT_S)
    for pid in dict.fromkeys([*pids, *family([process.pid])]):
        _kill(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _END_TIMEOUT_S
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def wait_until_answered(url: str, process: subprocess.Popen[bytes], *, timeout_s: float, log: Path) -> None:
    """Wait until a URL answers 200.

    Raises:
        NotUp: It did not in time, or its process ended.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotUp(f"it ended with exit code {process.returncode} while starting; see {log}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise NotUp(f"{url} did not answer within {timeout_s:.0f} s; see {log}")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and whose parent has not looked is as good as gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
