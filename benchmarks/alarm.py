"""A timer of the kernel for an event loop.

uvloop and asyncio wait in whole milliseconds, which is longer than a fast answer takes; a timerfd (timerfd_create(2))
is late by some ten microseconds.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1  # what time.perf_counter reads on Linux
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_TIMER_ABSTIME = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _ITimerSpec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


class Alarm:
    """Calls back at points in time.

    Args:
        loop: The running event loop.
        ring: Called when a time that was set has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._fd, self._read)

    def set(self, at: float) -> None:
        """Ring at this time, in seconds of `time.perf_counter`; a time that has passed rings at once."""
        ns = max(1, round(at * 1e9))  # zero would switch it off
        spec = _ITimerSpec(0, 0, ns // 10**9, ns % 10**9)
        if _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set again since it became readable
            return
        self._ring()
