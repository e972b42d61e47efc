"""Between Ray Tune's trials, which are actors, and the driver, whose threads run their pipelines.

A trial's actor holds no CPU and does no work: all CPUs stay with the pipelines, whose plan knows what they need: a
search cannot wait for a CPU that its own trials hold. It lives on the driver's machine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from ray import tune

Ask = Callable[[int, int], dict[str, Any]]


class TrialBridge:
    """Questions of trials and their answers; an actor."""

    def __init__(self) -> None:
        self._questions: asyncio.Queue[tuple[int, int, int]] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._count = 0

    async def ask(self, number: int, rung: int) -> dict[str, Any]:
        """The result of a trial's rung; returns when the driver has it."""
        self._count += 1
        question = self._count
        self._waiting[question] = asyncio.get_running_loop().create_future()
        await self._questions.put((question, number, rung))
        return await self._waiting[question]

    async def next(self, seconds: float) -> tuple[int, int, int] | None:
        """The next question; None where there is none for so long."""
        try:
            return await asyncio.wait_for(self._questions.get(), seconds)
        except asyncio.TimeoutError:
            return None

    async def answer(self, question: int, result: dict[str, Any]) -> None:
        self._waiting.pop(question).set_result(result)


class Trial(tune.Trainable):
    """A trial for Ray Tune: a step is a rung."""

    def setup(self, config: dict[str, Any], bridge: Any = None) -> None:
        self._bridge, self._rung = bridge, 0

    def step(self) -> dict[str, Any]:
        import ray

        result: dict[str, Any] = ray.get(self._bridge.ask.remote(int(self.config["number"]), self._rung))
        self._rung += 1
        return result

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._rung = 0
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None  # what a trial has done is in the store

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class Servers:
    """Threads of the driver that answer the desk; a context manager.

    Args:
        answer: trial and rung -> result; must not raise.
        count: of questions that are worked on at once.
    """

    def __init__(self, bridge: Any, answer: Ask, count: int) -> None:
        self._bridge, self._answer, self._end = bridge, answer, threading.Event()
        # Daemons: the interpreter does not wait for them after an interrupt.
        self._threads = [
            threading.Thread(target=self._serve, name=f"ktray-trial-{i}", daemon=True) for i in range(count)
        ]

    def __enter__(self) -> Servers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        if failure[0] is None:
            for thread in self._threads:
                thread.join()

    def _serve(self) -> None:
        import ray

        while not self._end.is_set():
            request = ray.get(self._bridge.next.remote(0.5))
            if request is not None:
                question, number, rung = request
                ray.get(self._bridge.answer.remote(question, self._answer(number, rung)))
