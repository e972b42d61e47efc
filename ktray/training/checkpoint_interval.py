"""How many steps lie between two checkpoints: by time, and by what a checkpoint costs."""

from __future__ import annotations

import math
from collections.abc import Callable

SHARE = 0.03  # of the time of training, which checkpoints may take
CHEAP = 0.5  # seconds of a checkpoint that is saved as often as requested, whatever its share


class CheckpointInterval:
    """The interval in steps, once the speed is known.

    The speed is measured twice. The first step is left out, because it allocates and compiles. The second measurement
    is more accurate, but with slow steps much work could be lost before it. A checkpoint of a large teacher takes
    seconds to write: the interval becomes as long as needed for `SHARE`.

    Args:
        seconds: wanted time between two checkpoints.
        steps: number of steps of the training.
        agree: returns the value of the first rank on every rank, because saving is a barrier over all ranks.
    """

    def __init__(self, seconds: float, steps: int, agree: Callable[[int], int]) -> None:
        self.seconds, self.agree = seconds, agree
        self.measured_at = {2, max(2, min(20, steps // 20))}
        self.every: int | None = None
        self.step_seconds = self._warm = 0.0

    def stepped(self, done: int, now: float) -> None:
        """Take the time after ``done`` steps of this attempt; ``now`` is on a monotonic clock, in seconds."""
        if done == 1:
            self._warm = now
        elif done in self.measured_at:
            self.step_seconds = max(1e-9, (now - self._warm) / (done - 1))
            self.every = self.agree(max(1, round(self.seconds / self.step_seconds)))

    def due(self, step: int) -> bool:
        """Whether a checkpoint is saved after this step."""
        return self.every is not None and step % self.every == 0

    def saved(self, seconds: float) -> None:
        """Lengthen the interval if a checkpoint took longer than its share. Every rank calls it after every save."""
        if self.every is not None:
            least = math.ceil(seconds / SHARE / self.step_seconds) if seconds > CHEAP else 1
            self.every = self.agree(max(self.every, least))
