"""The bridge between Ray Tune's trials, which are actors, and the driver, whose threads run the pipelines of trials.

A trial's actor holds no CPU and does no work. So all CPUs are available to the pipelines, whose allocations cover their
needs, and a search cannot wait for a CPU that its own trials hold. The actors run on the driver's machine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from ray import tune

Ask = Callable[[int, int], dict[str, Any]]


class TrialBridge:
    """An actor that passes questions of trials to the driver, and the answers back."""

    def __init__(self) -> None:
        self._questions: asyncio.Queue[tuple[int, int, int]] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._count = 0

    async def ask(self, number: int, rung: int) -> dict[str, Any]:
        """Return the result of a trial's rung as soon as the driver has it."""
        self._count += 1
        question = self._count
        self._waiting[question] = asyncio.get_running_loop().create_future()
        await self._questions.put((question, number, rung))
        return await self._waiting[question]

    async def next(self, seconds: float) -> tuple[int, int, int] | None:
        """Return the next question (id, trial, rung); None if there is none within ``seconds``."""
        try:
            return await asyncio.wait_for(self._questions.get(), seconds)
        except asyncio.TimeoutError:
            return None

    async def answer(self, question: int, result: dict[str, Any]) -> None:
        self._waiting.pop(question).set_result(result)


class Trial(tune.Trainable):
    """A trial for Ray Tune. Each step is a rung."""

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
        return None  # the progress of a trial is in the store

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class Servers:
    """Threads of the driver that answer the questions of the bridge; a context manager.

    Args:
        answer: maps trial and rung to the result; must not raise.
        count: number of questions that are answered at the same time.
    """

    def __init__(self, bridge: Any, answer: Ask, count: int) -> None:
        self._bridge, self._answer, self._end = bridge, answer, threading.Event()
        # The threads are daemons, so that the interpreter does not wait for them after an interrupt.
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
