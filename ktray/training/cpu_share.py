"""Threads of a training on CPUs that shares its cores with other programs.

The threads of a training meet at the end of each of the thousands of parallel loops of a step, and wait there for the
slowest one. If another program runs on one core, all of them wait whenever their colleague on that core is not running:
a step that should take twice as long takes hundreds of times as long. With a thread less, the others do not wait.

Linux counts how long each thread was ready to run and had no core (``/proc/PID/task/*/schedstat``). This is what tells
a busy neighbour from a slow step, also in containers, which do not see the programs of other containers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ktray.accounting.device import waited_seconds

logger = logging.getLogger("ktray")

# Cores for which the threads waited, from which on a thread less is tried, and below which one more is tried again.
_CROWDED, _FREE = 0.5, 0.15
_WINDOW = 2.0  # seconds over which both are measured
_SLOWER = 1.5  # factor on the usual time of a step from which on a neighbour matters
_BETTER = 1.1  # a change of the number of threads stays if the steps are faster by this factor
_PAUSE = 30.0  # seconds until the next attempt after one that did not help


@dataclass
class _Window:
    begun: float
    waited: float
    steps: int = 0


class CpuShare:
    """Chooses the number of threads of a training from step to step.

    Args:
        threads: the number without neighbours; None: that of torch.
        use: sets the number of threads.
        clock: a monotonic clock in seconds.
        waited: see `waited_seconds`.
    """

    def __init__(
        self,
        threads: int | None = None,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float] = waited_seconds,
    ) -> None:
        self._all = threads or torch.get_num_threads()
        self._use, self._clock, self._waited = use, clock, waited
        self.threads = self._all
        self._usual = math.inf  # seconds of a step with all threads and no neighbour
        self._before: tuple[int, float] | None = None  # threads and seconds of a step before an attempt
        self._not_before = 0.0
        self._told = False
        self._window = _Window(clock(), waited())

    def stepped(self) -> None:
        """A step is done. Changes the number of threads if it should be another one."""
        if self._all < 2:
            return
        window, now = self._window, self._clock()
        window.steps += 1
        if now - window.begun < _WINDOW:
            return
        waited = self._waited()
        seconds = (now - window.begun) / window.steps
        cores = (waited - window.waited) / (now - window.begun)
        self._decide(now, seconds, cores)
        self._window = _Window(self._clock(), waited)

    def end(self) -> None:
        """Use all threads again."""
        self._set(self._all)

    def _decide(self, now: float, seconds: float, cores: float) -> None:
        """Decide after a window.

        Args:
            seconds: of a step in the window.
            cores: mean number of threads that waited for a core.
        """
        if self._before is not None:
            threads, earlier = self._before
            self._before = None
            if seconds * _BETTER > earlier:  # it did not help
                self._not_before = now + _PAUSE
                self._set(threads)
            elif not self._told and self.threads < self._all:
                self._told = True
                logger.info(
                    f"threads   {self.threads} instead of {self._all}: other programs use the cores, and a step took "
                    f"{earlier / seconds:.1f} times as long"
                )
            return
        if self.threads == self._all and cores < _CROWDED:
            self._usual = min(self._usual, seconds)
        if now < self._not_before:
            return
        slow = seconds > _SLOWER * self._usual or math.isinf(self._usual)
        if self.threads > 1 and cores >= _CROWDED and slow:
            self._before = (self.threads, seconds)
            # A thread that shares its core with one other program waits half of the time.
            self._set(max(1, self.threads - math.ceil(2 * cores)))
        elif self.threads < self._all and cores <= _FREE:
            self._before = (self.threads, seconds)
            self._set(self._all)

    def _set(self, threads: int) -> None:
        if threads != self.threads:
            self._use(threads)
            self.threads = threads
