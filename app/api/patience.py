"""How long a request's work is wanted."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from starlette.types import Receive

from app.errors import ClientGone
from serve_app.contract import DeadlineExceeded


class Patience:
    """Ends what this task does inside the block, at a deadline or when the client leaves, whichever comes first.

    One timer and, once the body has been read, one small task: half of what `asyncio.timeout` and a task for the work
    itself would cost each request.

    Args:
        seconds: From now to the deadline.

    Raises:
        DeadlineExceeded, ClientGone: From the block, in place of the cancellation that ended it.
    """

    __slots__ = ("_cancelling", "_reason", "_seconds", "_task", "_timer", "_watch")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._reason: Exception | None = None
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Patience:
        task = asyncio.current_task()
        assert task is not None, "a request is always a task"
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = self._call_later(self._seconds)
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
        self._timer = self._call_later(seconds)

    def watch(self, receive: Receive) -> None:
        """End the block when the client leaves.

        Args:
            receive: Of a request whose body has been read; all that can still come is the disconnect.
        """
        self._watch = asyncio.ensure_future(self._wait_for_disconnect(receive))

    def _call_later(self, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, seconds), self._end, DeadlineExceeded())

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        message: Any = None
        while message != "http.disconnect":
            message = (await receive())["type"]
        self._end(ClientGone())

    def _end(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()
