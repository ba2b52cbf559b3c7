"""How long a request's work is wanted."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from starlette.types import Receive

from app.errors import ClientGone
from serve_app.contract import DeadlineExceeded

# Whoever leaves sooner is noticed then. Most requests are answered before, and the task that would notice costs each of
# them a tenth of what the gateway does for it.
LOOK_AFTER_S = 0.03


class Patience:
    """Ends what this task does inside the block, at a deadline or when the client leaves, whichever comes first.

    One timer serves both: it first fires to look for the client, and then at the deadline.

    Args:
        seconds: From now to the deadline.

    Raises:
        DeadlineExceeded, ClientGone: From the block, in place of the cancellation that ended it.
    """

    __slots__ = ("_cancelling", "_ends_at", "_loop", "_reason", "_receive", "_seconds", "_task", "_timer", "_watch")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._reason: Exception | None = None
        self._receive: Receive | None = None
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Patience:
        task = asyncio.current_task()
        assert task is not None, "a request is always a task"
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._set(self._seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self._reason is None:
            return
        # Who cancelled the request beside us, the server at its end for example, is heard first.
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._reason from None

    def shorten(self, seconds: float) -> None:
        """Move the deadline to so many seconds from now; a later one than before is not meant to be asked for."""
        self._timer.cancel()
        self._set(seconds)

    def watch(self, receive: Receive) -> None:
        """End the block when the client leaves; `LOOK_AFTER_S` may pass before that is noticed.

        Args:
            receive: Of a request whose body has been read; all that can still come is the disconnect.
        """
        self._receive = receive

    def _set(self, seconds: float) -> None:
        self._ends_at = self._loop.time() + seconds
        self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        """Look up after so many seconds, or sooner as long as nobody watches the client."""
        pause_s = seconds if self._watch is not None else min(seconds, LOOK_AFTER_S)
        self._timer = self._loop.call_later(max(0.0, pause_s), self._look_up)

    def _look_up(self) -> None:
        left_s = self._ends_at - self._loop.time()
        if left_s <= 0:
            self._end(DeadlineExceeded())
            return
        if self._receive is not None and self._watch is None:
            self._watch = asyncio.ensure_future(self._wait_for_disconnect(self._receive))
        self._wait(left_s)

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        message: Any = None
        while message != "http.disconnect":
            message = (await receive())["type"]
        self._end(ClientGone())

    def _end(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()
