"""The one place where a call meets its arm, and where an arm's failure becomes an answer from another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from app.backends.base import FAIR_BUDGET_S, Answer, Arm, Backend, Call
from app.rollout.choice import hash_principal, is_canary
from app.rollout.evidence import SIDES, Side
from app.rollout.record import Record
from serve_app.contract import (
    DeadlineExceeded,
    InvalidWindows,
    ModelNotFound,
    ModelOutputInvalid,
    NotReady,
    Overloaded,
    ServingError,
    Unavailable,
)

RAY_SERVE = "ray_serve"
LEGACY = "legacy"

# While a fallback is ready, the arm that was chosen may use this much of the time left; the rest is the fallback's.
_FIRST_BUDGET = 0.7

# What no other arm is asked to make good: bad input, which it would refuse as well, and our own shedding, where more
# work elsewhere would only move the overload. Every other failure is the arm's own.
_FINAL: tuple[type[ServingError], ...] = (InvalidWindows, Overloaded)


class Witness(Protocol):
    """Sees what comes of each request that was given to one side of the rollout."""

    def count_answer(self, side: Side, seconds: float) -> None:
        """The side's arm answered after `seconds`."""

    def count_given_up(self, side: Side, seconds: float) -> None:
        """A caller in a hurry gave it up after `seconds`."""

    def count_failure(self, side: Side, *, invalid: bool = False) -> None:
        """It did not, or its model's output had to be withheld."""


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and who gave it.

    Attributes:
        answer: Checked by the backend: finite, and class rows that are distributions.
        arm: Who answered.
        fallback: Code of the failure that another arm made good, None where the chosen arm answered.
        side: The side of the rollout that the caller was given to, and whose arm was asked first; None where that
            could not be asked, or the request named its backend or version itself.
    """

    answer: Answer
    arm: Arm
    fallback: str | None = None
    side: Side | None = None


class Route(NamedTuple):
    """Where a call goes.

    Attributes:
        arm: Who is asked.
        side: The side of the rollout that this is, None where the request chose, or its side cannot be asked.
        spare: Who is asked where that fails, None for nobody.
    """

    arm: Arm
    side: Side | None = None
    spare: Arm | None = None


class Choice(NamedTuple):
    """Where the callers of a side go: as `Route`, but with all who may be asked where that fails."""

    arm: Arm
    side: Side | None
    spares: tuple[Arm, ...]


class Dispatcher:
    """Sends each call to its arm.

    Args:
        backends: At most one of each name, `ray_serve` and `legacy`. With one alone, it answers everything.
        record: Gives the rollout's record in force.
        sticky_key: Key of the hash that keeps a caller on one side, 16 to 64 bytes.
        witness: Sees what comes of what was given to the sides.
        clock: Monotonic seconds, the clock of `Call.deadline`.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        record: Callable[[], Record],
        sticky_key: bytes,
        witness: Witness,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._record = record
        self._sticky_key = sticky_key
        self._witness = witness
        self._clock = clock
        self._routed: Record | None = None
        self._choices: dict[Side, Choice] = {}  # of the record that was routed by last: they change with it alone

    async def predict(
        self, call: Call, *, subject: str, accounts: Sequence[str] = (), route_to: str | None = None
    ) -> Served:
        """Answer the call from the arm that its caller belongs to.

        Args:
            call: Validated windows and their deadline; a version that it names answers, or none does.
            subject: What keeps the caller on one side: its principal, or the route key it may give.
            accounts: The principal and its tenant, as shares of their own name them, the closer one first.
            route_to: Name of the backend to use whatever the share is; no fallback then.

        Raises:
            ModelNotFound: No arm serves the version that the call names.
            ServingError: What the arm, and the fallback where one was tried, could not make good.
        """
        route = self._route(call.version, subject, accounts, route_to)
        if route.spare is None:
            return Served(await self._witnessed(route, call), route.arm, side=route.side)
        # One that still loads, or is left alone because it fails, is nothing to keep time for.
        first_call = self._with_time_to_fall_back(call) if self._is_ready(route.spare) else call
        try:
            return Served(await self._witnessed(route, first_call), route.arm, side=route.side)
        except _FINAL:
            raise
        except ServingError as error:
            if self._clock() >= call.deadline:
                raise
            rescued = replace(call, is_fallback=True)
            return Served(await self._ask(route.spare, rescued), route.spare, fallback=error.code, side=route.side)

    def versions(self) -> list[str]:
        """Model versions that some arm serves now, sorted."""
        served = (backend.status().versions or () for backend in self._backends.values())
        return sorted(set().union(*served))

    def arms_serving(self, version: str | None) -> Collection[str]:
        """Names of the backends that can answer with this version; whoever names none takes any.

        Raises:
            ModelNotFound: Nobody serves it.
            NotReady: Nobody does whose versions are known, and those of some backend are not.
        """
        if version is None:
            return self._backends
        served = {name: backend.status().versions for name, backend in self._backends.items()}
        if names := [name for name, versions in served.items() if versions is not None and version in versions]:
            return names
        if None in served.values():
            raise NotReady("not every arm is ready, and none of the others serves that version")
        raise ModelNotFound("no such version is served")

    def _route(self, version: str | None, subject: str, accounts: Sequence[str], route_to: str | None) -> Route:
        if route_to is not None:
            return Route(Arm(route_to, version))
        record = self._record()
        if record is not self._routed:
            self._routed, self._choices = record, {side: self._choice(record, side, None) for side in SIDES}
        share = record.share_of(accounts)
        side: Side = "canary" if is_canary(hash_principal(self._sticky_key, subject), share) else "stable"
        choice = self._choices[side] if version is None else self._choice(record, side, version)
        ready = next((arm for arm in choice.spares if self._is_ready(arm)), None)
        return Route(choice.arm, choice.side, ready or (choice.spares[0] if choice.spares else None))

    def _choice(self, record: Record, side: Side, version: str | None) -> Choice:
        """Who is asked of a side's callers, and in what order the others are; a canary makes good for nobody."""
        wanted = [record.arm(side), record.arm("stable"), Arm(LEGACY), record.arm("canary")]
        names = self.arms_serving(version)
        if version is not None:
            wanted = [Arm(arm.backend, version) for arm in wanted]
        arm, *others = dict.fromkeys(arm for arm in wanted if arm.backend in names) or [wanted[0]]
        has_spares = side == "canary" or arm.backend != LEGACY
        spares = tuple(other for other in others if has_spares and other != record.arm("canary"))
        return Choice(arm, side if arm == record.arm(side) else None, spares)

    def _is_ready(self, arm: Arm) -> bool:
        return self._backends[arm.backend].is_ready(arm.version)

    def _with_time_to_fall_back(self, call: Call) -> Call:
        now = self._clock()
        return replace(call, deadline=now + _FIRST_BUDGET * (call.deadline - now), has_fallback=True)

    async def _witnessed(self, route: Route, call: Call) -> Answer:
        """Ask the arm, and tell the witness what came of it where that speaks of a side."""
        if route.side is None:
            return await self._ask(route.arm, call)
        began = self._clock()
        try:
            answer = await self._ask(route.arm, call)
        except InvalidWindows:
            raise
        except asyncio.CancelledError:
            if self._is_in_force(route, route.side):
                self._tell_leaving(route.side, began, call.deadline)
            raise
        except ServingError as error:
            if self._is_in_force(route, route.side):
                self._tell_failure(route.side, error, self._clock() - began)
            raise
        if self._is_in_force(route, route.side):
            self._witness.count_answer(route.side, self._clock() - began)
        return answer

    def _is_in_force(self, route: Route, side: Side) -> bool:
        """Whether the side is still this arm's: what one arm did late says nothing of the arm that followed it."""
        record = self._record()
        return record is self._routed or record.arm(side) == route.arm

    def _tell_leaving(self, side: Side, began: float, deadline: float) -> None:
        """Nobody waits any more: who left early waited so long at least, and a deadline was missed."""
        now = self._clock()
        if now >= deadline and now - began >= FAIR_BUDGET_S:
            self._witness.count_failure(side)
        else:
            self._witness.count_given_up(side, now - began)

    def _tell_failure(self, side: Side, error: ServingError, seconds: float) -> None:
        if isinstance(error, DeadlineExceeded) and seconds < FAIR_BUDGET_S:
            # What a caller in a hurry did not wait for says how slow the arm is at least, and no more.
            self._witness.count_given_up(side, seconds)
        else:
            self._witness.count_failure(side, invalid=isinstance(error, ModelOutputInvalid))

    async def _ask(self, arm: Arm, call: Call) -> Answer:
        backend = self._backends.get(arm.backend)
        if backend is None:
            raise NotReady("this arm is not configured")
        named = call.version is not None
        if arm.version is not None and not named:
            call = replace(call, version=arm.version)
        try:
            answer = await backend.predict(call)
        except ModelNotFound:
            if named:
                raise
            raise Unavailable("this arm's version is not served") from None
        if call.version not in (None, answer.prediction.model_version):
            raise Unavailable("another version answered: the model was being replaced")
        return answer
