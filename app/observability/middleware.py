"""The outermost layer of every request: its ledger and id, the common headers, the access log, the last resort.

Hot routes are answered from here. The layers between here and a route (instrumentator, exception handling, the
framework's own, the walk through the routes) cost a quarter of what a hot route itself does, and a hot route needs
none of them: it is plain ASGI, its refusals are translated here, and it is counted here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import orjson
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.drain import Drain
from app.errors import REFUSALS, problem_response
from app.front import Front, Headers
from app.observability.ledger import Ledger
from app.observability.logs import LineWriter, timestamp
from app.observability.metrics import METHODS, Metrics

_LOGGER = logging.getLogger(__name__)


class Edge:
    """Pure ASGI: opens the ledger, stamps every answer, logs it, and answers 500 for what nobody caught.

    Args:
        app: The next layer.
        hot_routes: By exact path, routes whose `app` is plain ASGI; they stand among the application's routes as
            well, which document them and refuse other methods.
        front: Looks at every request's head first.
        metrics: Counts the requests that are answered here; the instrumentator counts all others.
        drain: Tells when every answer shall close its connection.
        clock: Monotonic seconds.
        access_log: Takes one line per request; None for no access log.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hot_routes: Mapping[str, Route],
        front: Front,
        metrics: Metrics,
        drain: Drain,
        clock: Callable[[], float],
        access_log: LineWriter | None,
    ) -> None:
        self._app = app
        self._hot_routes = {
            (method, path): route for path, route in hot_routes.items() for method in route.methods or ()
        }
        self._front = front
        self._metrics = metrics
        self._drain = drain
        self._clock = clock
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ledger = Ledger(self._clock)
        ledger.open(scope)
        common_headers = self._front.headers_for(scope)
        app, template = self._find(scope, ledger)
        status = 0

        async def stamp(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = (b"x-request-id", ledger.request_id.encode())
                timing = (b"server-timing", ledger.server_timing().encode())
                message["headers"] = [*message.get("headers", ()), *common_headers, request_id, timing]
                if self._drain.has_begun:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await app(scope, receive, stamp)
        except Exception as error:
            if not isinstance(error, REFUSALS):
                _LOGGER.exception("unhandled exception", extra={"request_id": ledger.request_id})
            if status:  # the head has left: only a cut connection can still say that this answer is not whole
                raise
            await problem_response(error, scope["path"], ledger.request_id)(scope, receive, stamp)
        finally:
            if template is not None:
                self._metrics.http.count_request(
                    method=scope["method"],
                    route=template,
                    status=str(status or 499),
                    seconds=ledger.total_ms() / 1e3,
                )
            if self._access_log is not None:
                self._access_log.write_line(_access_line(scope, ledger, status))

    def _find(self, scope: Scope, ledger: Ledger) -> tuple[ASGIApp, str | None]:
        """Who answers, and the template under which that is counted here; None where it is counted further in."""
        if fault := self._front.fault_in(scope):
            ledger.facts["error"] = fault.code
            return problem_response(fault, scope["path"], ledger.request_id), "none"
        if headers := self._front.preflight(scope):
            return _NoContent(headers), "none"
        hot_route = self._hot_routes.get((scope["method"], scope["path"]))
        if hot_route is None:
            return self._app, None
        scope["route"] = hot_route
        return hot_route.app, hot_route.path


class _NoContent:
    """An answer of headers alone."""

    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": self._headers})
        await send({"type": "http.response.body"})


def _access_line(scope: Scope, ledger: Ledger, status: int) -> bytes:
    """Nothing of the caller's own making, but for values that were checked against a narrow pattern of ASCII."""
    route = scope.get("route")
    fields = {
        "time": timestamp(),
        "level": "info",
        "event": "request",
        "request_id": ledger.request_id,
        "method": scope["method"] if scope["method"] in METHODS else "other",
        "route": getattr(route, "path", "none"),
        "status": status,
        "duration_ms": round(ledger.total_ms(), 3),
        **ledger.facts,
    }
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
