"""A loop whose clock is moved by hand, and a destination that answers when told: no test here sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np

from app.backends.base import Call
from app.backends.coalesce import Group
from serve_app.contract import N_FEATURES, N_STEPS, Options, Prediction


class HandDrivenLoop(asyncio.SelectorEventLoop):
    """Time stands still until `advance`; timers that became due then fire in order."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.now

    async def settle(self) -> None:
        """Let everything that can run without time passing run."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        await self.settle()
        self.now += seconds
        await self.settle()


def drive(scenario: Callable[[HandDrivenLoop], Coroutine[Any, Any, None]]) -> None:
    """Run the scenario on a hand-driven loop."""
    with asyncio.Runner(loop_factory=HandDrivenLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, HandDrivenLoop)
        runner.run(scenario(loop))


def windows(*marks: float) -> np.ndarray:
    """One window per mark, filled with it, so that an answer shows whose window it is for."""
    batch = np.empty((len(marks), N_FEATURES, N_STEPS), np.float32)
    batch[:] = np.asarray(marks, np.float32)[:, None, None]
    return batch


def call(
    *marks: float,
    deadline: float = 1002.0,
    options: Options | None = None,
    version: str | None = None,
    principal: str = "0" * 16,
) -> Call:
    return Call(windows(*marks), options or Options(), deadline, "r", principal, version)


def prediction_of(group: Group, *, version: str = "1", model_ms: float = 0.0, wait_ms: float = 0.0) -> Prediction:
    """An answer whose regression is each window's mark."""
    marks = np.concatenate([part.windows[:, 0, 0] for part in group.parts])
    return prediction_for(marks, version=version, model_ms=model_ms, wait_ms=wait_ms)


def prediction_for(marks: np.ndarray, *, version: str = "1", model_ms: float = 0.0, wait_ms: float = 0.0) -> Prediction:
    B = len(marks)
    third = np.full((B, 3), 1 / 3, np.float32)
    return Prediction(third, marks, None, None, None, None, third, None, "echo", version, model_ms, wait_ms)


class HandDrivenSend:
    """Keeps every group that is sent until the test answers it."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.cancelled: list[Group] = []
        self._answers: dict[int, asyncio.Future[Prediction]] = {}

    async def __call__(self, group: Group) -> Prediction:
        answer: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._answers[len(self.groups)] = answer
        self.groups.append(group)
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancelled.append(group)
            raise

    @property
    def marks(self) -> list[list[float]]:
        """Each sent group as its windows' marks."""
        return [[float(w[0, 0]) for part in group.parts for w in part.windows] for group in self.groups]

    def answer(self, index: int, **more: Any) -> None:
        self._answers[index].set_result(prediction_of(self.groups[index], **more))

    def answer_with(self, index: int, prediction: Prediction) -> None:
        self._answers[index].set_result(prediction)

    def fail(self, index: int, error: Exception) -> None:
        self._answers[index].set_exception(error)

    def answer_all(self) -> None:
        for index, waiting in self._answers.items():
            if not waiting.done():
                self.answer(index)


def spawn(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(awaitable)
