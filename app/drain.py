"""The end of a gateway's life, told before it comes: callers move on while they are still answered."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

_log = logging.getLogger(__name__)


class Drain:
    """Whether this process is about to leave.

    From `begin` on the gateway says that it is not ready, so that no new traffic is sent to it, and closes every
    connection with its next answer, so that no client sends on one that is about to be closed under it.
    """

    def __init__(self) -> None:
        self.has_begun = False

    def begin(self) -> None:
        self.has_begun = True

    def begin_on_sigterm(self, notice_s: float) -> None:
        """Answer SIGTERM with `notice_s` seconds of notice; the server's own way to end follows.

        To be called on the running loop, from the main thread, after the server has set its handlers. A second
        signal ends the notice.
        """
        loop = asyncio.get_running_loop()
        end_server = signal.getsignal(signal.SIGTERM)

        def leave() -> None:
            signal.signal(signal.SIGTERM, end_server)
            signal.raise_signal(signal.SIGTERM)

        def give_notice() -> None:
            if self.has_begun:
                return
            self.begin()
            _log.info("leaving: not ready any more, ending in %g s", notice_s)
            loop.call_later(notice_s, leave)

        def take(_signal: int, _frame: FrameType | None) -> None:
            if self.has_begun:
                signal.signal(signal.SIGTERM, end_server)
                signal.raise_signal(signal.SIGTERM)
            loop.call_soon_threadsafe(give_notice)

        signal.signal(signal.SIGTERM, take)
