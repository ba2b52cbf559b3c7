"""The hot path: one prediction request from its bytes to its answer's, the same for every protocol.

    token ─ headers ─ kill switch ─ place ─ body ─ `Dialect.read` ─ rate limit ─ rollout and backend ─ `Dialect.write`

The order is the path's defence: the token before the body, the body counted while it arrives, every window checked
before any is counted against the caller's quota, and the quota before the model. A hot route is plain ASGI inside
the FastAPI application, which documents it; the protocol that it speaks is its `Dialect`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from app.api.bodies import single_headers
from app.api.deps import require_model, require_scope, spend
from app.api.patience import Patience
from app.auth import Door, Identity, Principal
from app.backends.base import MAX_CALL_WINDOWS, Call
from app.errors import BadRequest, Forbidden, InvalidInput, Killed, problem_of
from app.observability.ledger import Ledger
from app.observability.metrics import Metrics
from app.observability.statistics import InferenceStatistics
from app.rate_limit import Allowance, Limits
from app.rollout.choice import hash_principal
from app.rollout.dispatch import LEGACY, RAY_SERVE, Dispatcher, Served
from app.rollout.kill import KillSwitch
from app.rollout.trial import Trial
from serve_app.contract import FloatArray, ModelNotFound, Options, ServingError

_LOGGER = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

# What the path itself reads of a request's headers; a dialect adds its own.
_HEADERS = frozenset(
    {
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"x-request-timeout-ms",
        b"x-request-id",
        b"x-route-to",
        b"x-route-key",
        b"x-symbol",
        b"traceparent",
    }
)
_DIGITS = re.compile(rb"[0-9]{1,6}")
_CLIENT_REQUEST_ID = re.compile(rb"(?!gk_|eyJ)[A-Za-z0-9_.-]{1,64}")  # a credential in the wrong header is not repeated
_SYMBOL = re.compile(rb"[A-Z0-9._-]{1,32}")
_ROUTE_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, section 3.2.2
_BACKENDS = {RAY_SERVE.encode(): RAY_SERVE, LEGACY.encode(): LEGACY}

# Backends end a call at its deadline; this much later the gateway does it for one that did not.
_DEADLINE_GRACE_S = 0.02


class Asked(NamedTuple):
    """What a body asks for.

    Attributes:
        windows: float32[B, F, T], checked by `as_windows`.
        options: What to answer beside the prediction.
        version: Model version asked for, None for whichever is served.
        timeout_ms: A deadline in the body; it and the header's both count.
        detail: What only the dialect needs again, to write the answer.
    """

    windows: FloatArray
    options: Options
    version: str | None = None
    timeout_ms: int | None = None
    detail: Any = None


class Dialect(Protocol):
    """How one protocol writes down windows and predictions.

    Attributes:
        headers: Names of the headers, lower case, that it reads beside the path's own.
    """

    headers: frozenset[bytes]

    async def read(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Asked:
        """Read and check the request's body.

        Args:
            scope: For path and query.
            headers: Each at most once, by lower-case name.
            receive: For the body, of which nothing has been read.

        Raises:
            GatewayError, ServingError: The body is not what it must be.
        """

    def write(
        self, asked: Asked, served: Served, ledger: Ledger, client_request_id: str | None
    ) -> tuple[bytes, Headers]:
        """The answer's body, and the headers that describe it but for its length."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the request's headers ask for.

    Attributes:
        deadline: Seconds on the monotonic clock.
        client_request_id: The caller's own id of the request, where it has a harmless form.
        route_to: Backend to use whatever the share is.
        route_key: What keeps the caller on one arm instead of its subject.
        symbol: Tag of what the windows are of.
        trace: W3C traceparent.
    """

    deadline: float
    client_request_id: str | None
    route_to: str | None
    route_key: str | None
    symbol: str | None
    trace: str | None


class Reply(NamedTuple):
    """An answer ready to be sent, and what it says of whom for the books.

    Attributes:
        symbol: Tag of what was asked for.
    """

    body: bytes
    headers: list[tuple[bytes, bytes]]
    call: Call
    served: Served
    symbol: str | None


class HotPath:
    """The path of one protocol, as an ASGI application.

    Args:
        dialect: The protocol.
        door: Tells who asks.
        model: The one that is asked for here.
        limits: How much an account may ask for.
        kills: Tells what is to be refused.
        dispatcher: Sends the call to its arm.
        trial: Takes calls and their answers while a plan wants them.
        metrics: Counts what came of it.
        statistics: Counts it by model version.
        sticky_key: Key of the hash under which the caller is known behind the edge.
        max_timeout_ms: Longest deadline, and the default.
        route_key_principals: Tenants and subjects who may choose a route key.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        dialect: Dialect,
        *,
        door: Door,
        model: str,
        limits: Limits,
        kills: KillSwitch,
        dispatcher: Dispatcher,
        trial: Trial,
        metrics: Metrics,
        statistics: InferenceStatistics,
        sticky_key: bytes,
        max_timeout_ms: int,
        route_key_principals: frozenset[Identity],
        clock: Callable[[], float],
    ) -> None:
        self._dialect = dialect
        self._header_names = _HEADERS | dialect.headers
        self._door = door
        self._model = model
        self._limits = limits
        self._kills = kills
        self._dispatcher = dispatcher
        self._trial = trial
        self._metrics = metrics
        self._statistics = statistics
        self._sticky_key = sticky_key
        self._max_timeout_ms = max_timeout_ms
        self._route_key_principals = route_key_principals
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ledger = Ledger.of(scope)
        ledger.open_stage = "auth"
        try:
            reply = await self._answer(scope, receive, ledger)
        except Exception as error:
            self._record_refusal(error, ledger)
            raise
        seconds = ledger.total_ms() / 1e3
        await send({"type": "http.response.start", "status": 200, "headers": reply.headers})
        await send({"type": "http.response.body", "body": reply.body})
        self._record_answer(reply, ledger, seconds)  # the caller need not wait for our bookkeeping
        if self._trial.is_on:
            self._trial.take(reply.call, reply.served, tag=reply.symbol)

    async def _answer(self, scope: Scope, receive: Receive, ledger: Ledger) -> Reply:
        principal = await self._door.admit(scope)
        require_scope(principal, "predict")
        require_model(principal, self._model)
        ledger.close_stage("auth")
        headers = single_headers(scope, self._header_names)
        wish = self._read_wish(headers, principal, ledger)
        epoch = self._refuse_if_killed(principal, wish)
        account = hash_principal(self._sticky_key, principal.account)
        ledger.facts["principal"] = account
        with self._limits.concurrency.place(account), Patience(self._left_s(wish)) as patience:
            asked = await self._dialect.read(scope, headers, receive)
            if asked.timeout_ms is not None:
                deadline = ledger.started_at + asked.timeout_ms / 1e3
                wish = replace(wish, deadline=min(wish.deadline, deadline))
                patience.shorten(self._left_s(wish))
            if len(asked.windows) > MAX_CALL_WINDOWS:
                raise InvalidInput(f"a request may hold at most {MAX_CALL_WINDOWS} windows")
            ledger.close_stage("decode")
            allowance = await spend(self._limits.predict, self._metrics, account, len(asked.windows))
            ledger.close_stage("limit")
            patience.watch(receive)
            call = _call(asked, wish, account, ledger)
            served = await self._predict(call, wish, principal, ledger)
        ledger.close_call(served.answer.stages_ms)
        body, described = self._dialect.write(asked, served, ledger, wish.client_request_id)
        ledger.close_stage("encode")
        if epoch != self._kills.epoch:  # what was killed while it was under way
            self._refuse_if_killed(principal, wish)
        return Reply(body, _answer_headers(body, described, served, allowance), call, served, wish.symbol)

    def _refuse_if_killed(self, principal: Principal, wish: Wish) -> int:
        """The epoch in which the request is not killed. Raises `Killed`."""
        kills = self._kills
        if kills.is_thrown and (scope := kills.scope_killed(self._model, principal.accounts, wish.symbol)):
            self._metrics.changes.count_killed(scope)
            raise Killed(scope)
        return kills.epoch

    def _left_s(self, wish: Wish) -> float:
        return wish.deadline - self._clock() + _DEADLINE_GRACE_S

    def _read_wish(self, headers: Mapping[bytes, bytes], principal: Principal, ledger: Ledger) -> Wish:
        timeout_ms = self._max_timeout_ms
        if (text := headers.get(b"x-request-timeout-ms")) is not None:
            timeout_ms = int(text) if _DIGITS.fullmatch(text) else 0
            if not 1 <= timeout_ms <= self._max_timeout_ms:
                raise BadRequest(f"X-Request-Timeout-Ms must be an integer from 1 to {self._max_timeout_ms}")
        client_request_id = _matching(_CLIENT_REQUEST_ID, headers.get(b"x-request-id"))
        if client_request_id is not None:
            ledger.facts["client_request_id"] = client_request_id
        if (symbol := _symbol(headers.get(b"x-symbol"))) is not None:
            ledger.facts["symbol"] = symbol
        return Wish(
            deadline=ledger.started_at + timeout_ms / 1e3,
            client_request_id=client_request_id,
            route_to=_route_to(headers.get(b"x-route-to"), principal),
            route_key=self._route_key(headers.get(b"x-route-key"), principal),
            symbol=symbol,
            trace=_matching(_TRACE, headers.get(b"traceparent")),
        )

    def _route_key(self, text: bytes | None, principal: Principal) -> str | None:
        if text is None:
            return None
        if principal.identity not in self._route_key_principals:
            raise Forbidden("this principal may not choose a route key")
        key = _matching(_ROUTE_KEY, text)
        if key is None:
            raise BadRequest("X-Route-Key must have 1 to 255 visible ASCII characters")
        return key

    async def _predict(self, call: Call, wish: Wish, principal: Principal, ledger: Ledger) -> Served:
        subject = principal.account if wish.route_key is None else principal.key_of(wish.route_key)
        try:
            return await self._dispatcher.predict(
                call, subject=subject, accounts=principal.accounts, route_to=wish.route_to
            )
        except ModelNotFound:
            raise
        except ServingError:
            self._statistics.count_failure(call.version, ledger.total_ms())
            raise

    def _record_answer(self, reply: Reply, ledger: Ledger, seconds: float) -> None:
        served, n_windows = reply.served, len(reply.call.windows)
        version = served.answer.prediction.model_version or "unknown"
        ledger.facts.update(windows=n_windows, arm=served.arm.backend, model_version=version)
        if served.fallback:
            ledger.facts["fallback"] = served.fallback
        self._metrics.predictions.count_answer(
            version=version,
            arm=served.arm.backend,
            fallback=served.fallback,
            windows=n_windows,
            seconds=seconds,
            stages_ms=ledger.stages_ms,
        )
        self._statistics.count_answer(
            served.answer.prediction.model_version,
            windows=n_windows,
            groups=served.answer.groups,
            duration_ms=1e3 * seconds,
            stages_ms=ledger.stages_ms,
        )

    def _record_refusal(self, error: Exception, ledger: Ledger) -> None:
        problem = problem_of(error)
        ledger.facts["error"] = problem.code
        self._metrics.predictions.count_refusal(problem.code)
        if problem.status == 502:
            _LOGGER.warning("%s: %s", problem.code, error, extra={"request_id": ledger.request_id})


class HotRoute(APIRoute):
    """A route that FastAPI documents and a `HotPath` answers, without FastAPI's own parsing in between.

    Args:
        path: Of the route.
        hot_path: Answers it.
        describe: A function whose signature and docstring say what OpenAPI shows.
        documentation: Further arguments of `APIRoute`.
    """

    def __init__(
        self, path: str, hot_path: HotPath, describe: Callable[..., Any], documentation: Mapping[str, Any]
    ) -> None:
        super().__init__(path, describe, methods=["POST"], **documentation)
        self.app = hot_path


def _call(asked: Asked, wish: Wish, account: str, ledger: Ledger) -> Call:
    return Call(
        windows=asked.windows,
        options=asked.options,
        deadline=wish.deadline,
        request_id=ledger.request_id,
        principal=account,
        version=asked.version,
        trace=wish.trace,
    )


def _route_to(text: bytes | None, principal: Principal) -> str | None:
    if text is None:
        return None
    require_scope(principal, "ops")
    if text not in _BACKENDS:
        raise BadRequest("X-Route-To must be one of " + ", ".join(_BACKENDS.values()))
    return _BACKENDS[text]


def _symbol(text: bytes | None) -> str | None:
    symbol = _matching(_SYMBOL, text)
    if text is not None and symbol is None:
        raise BadRequest("X-Symbol must have 1 to 32 upper-case letters, digits, dots, hyphens and underscores")
    return symbol


def _matching(pattern: re.Pattern[bytes], text: bytes | None) -> str | None:
    return text.decode("ascii") if text is not None and pattern.fullmatch(text) else None


def _answer_headers(body: bytes, described: Headers, served: Served, allowance: Allowance) -> list[tuple[bytes, bytes]]:
    headers = [
        *described,
        (b"content-length", str(len(body)).encode()),
        (b"x-served-by", served.arm.backend.encode()),
        *((name.lower().encode(), value.encode()) for name, value in allowance.headers().items()),
    ]
    if served.fallback:
        headers.append((b"x-fallback", served.fallback.encode()))
    return headers
