"""The one place where a call meets its arm, and where a failure on Ray Serve becomes an answer from legacy."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from app.backends.base import Answer, Arm, Backend, Call
from app.rollout.choice import hash_principal, is_canary
from serve_app.contract import InvalidWindows, ModelNotFound, NotReady, Overloaded, ServingError, Unavailable

CANARY = "ray_serve"
STABLE = "legacy"

# While a fallback is ready, Ray Serve may use this much of the time left; the rest is legacy's to answer in.
_CANARY_BUDGET = 0.7

# What legacy is not asked to make good: bad input, which it would refuse as well, and our own shedding, where more
# work elsewhere would only move the overload. Every other failure is Ray Serve's own.
_FINAL: tuple[type[ServingError], ...] = (InvalidWindows, ModelNotFound, Overloaded)


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and who gave it.

    Attributes:
        answer: Checked by the backend: finite, and class rows that are distributions.
        arm: Who answered.
        fallback: Code of the failure that legacy made good, None where the chosen arm answered.
    """

    answer: Answer
    arm: Arm
    fallback: str | None = None


class Dispatcher:
    """Sends each call to its arm.

    Args:
        backends: At most one of each name, `ray_serve` and `legacy`. With one alone, it answers everything.
        fraction: Gives the share of callers whom Ray Serve answers now, 0..1.
        sticky_key: Key of the hash that keeps a caller on one side, 16 to 64 bytes.
        clock: Monotonic seconds, the clock of `Call.deadline`.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        fraction: Callable[[], float],
        sticky_key: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._fraction = fraction
        self._sticky_key = sticky_key
        self._clock = clock

    async def predict(self, call: Call, *, subject: str, route_to: str | None = None) -> Served:
        """Answer the call from the arm that its caller belongs to.

        Args:
            call: Validated windows and their deadline; a version that it names answers, or none does.
            subject: What keeps the caller on one side: its principal, or the route key it may give.
            route_to: Name of the backend to use whatever the share is; no fallback then.

        Raises:
            ModelNotFound: No arm serves the version that the call names.
            ServingError: What the arm, and the fallback where one was tried, could not make good.
        """
        arms = (route_to,) if route_to else self.arms_serving(call.version)
        backend = self._choose(subject, arms)
        if backend != CANARY or STABLE not in arms:
            return Served(await self._ask(backend, call), Arm(backend, call.version))
        # A legacy that still loads, or is left alone because it fails, is nothing to keep time for.
        is_fallback_ready = self._backends[STABLE].is_ready(call.version)
        canary_call = self._with_time_to_fall_back(call) if is_fallback_ready else call
        try:
            return Served(await self._ask(backend, canary_call), Arm(backend, call.version))
        except _FINAL:
            raise
        except ServingError as error:
            if self._clock() >= call.deadline:
                raise
            return Served(await self._ask(STABLE, call), Arm(STABLE, call.version), fallback=error.code)

    def _with_time_to_fall_back(self, call: Call) -> Call:
        now = self._clock()
        return replace(call, deadline=now + _CANARY_BUDGET * (call.deadline - now), has_fallback=True)

    def versions(self) -> list[str]:
        """Model versions that some arm serves now, sorted."""
        served = (backend.status().versions or () for backend in self._backends.values())
        return sorted(set().union(*served))

    def arms_serving(self, version: str | None) -> Collection[str]:
        """Names of the arms that can answer with this version; whoever names none takes any.

        Raises:
            ModelNotFound: Nobody serves it.
            NotReady: Nobody does whose versions are known, and those of some arm are not.
        """
        if version is None:
            return self._backends
        served = {name: backend.status().versions for name, backend in self._backends.items()}
        if arms := [name for name, versions in served.items() if versions is not None and version in versions]:
            return arms
        if None in served.values():
            raise NotReady("not every arm is ready, and none of the others serves that version")
        raise ModelNotFound("no such version is served")

    def _choose(self, subject: str, arms: Collection[str]) -> str:
        if len(arms) == 1:
            return next(iter(arms))
        return CANARY if is_canary(hash_principal(self._sticky_key, subject), self._fraction()) else STABLE

    async def _ask(self, name: str, call: Call) -> Answer:
        backend = self._backends.get(name)
        if backend is None:
            raise NotReady("this arm is not configured")
        answer = await backend.predict(call)
        if call.version not in (None, answer.prediction.model_version):
            raise Unavailable("another version answered: the model was being replaced")
        return answer
