"""The context of a training worker, and the specification of what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ktray.training.loop import TrainerSettings, TrainingProgram
from ktray.training.messages import Message
from ktray.training.virtual_ranks import ranks_of_worker, virtual_ranks


@dataclass(frozen=True)
class WorkerContext:
    """The context of a worker: its place among the workers and its resources.

    Attributes:
        device: the worker's device.
        rank, world: rank of the worker, and number of workers.
        read_cpus: CPUs of a task that reads rows for the worker.
        teachers: number of teachers that may run for the worker during training.
        teacher_gpus, teacher_threads: GPUs and threads of each of these teachers.
        report: posts messages of a reader to the driver.
        span: minimum and maximum number of workers that the run may have; None: the number is fixed.
        virtual_ranks: number of virtual ranks of the training rows (`divide`); 0: one for each worker.
    """

    device: torch.device
    rank: int
    world: int
    read_cpus: float
    teachers: int = 1
    teacher_gpus: float = 0.0
    teacher_threads: int = 1
    report: Callable[[Message], None] = lambda message: None
    span: tuple[int, int] | None = None
    virtual_ranks: int = 0

    def divide(self, *batches: int) -> WorkerContext:
        """This context with a number of virtual ranks that fits the batches.

        Args:
            batches: sizes of the batches of a step, in rows over all workers.
        """
        return replace(self, virtual_ranks=virtual_ranks(*(self.span or (self.world, self.world)), *batches))

    @property
    def rank_count(self) -> int:
        """Number of virtual ranks of all workers."""
        return self.virtual_ranks or self.world

    @property
    def own_ranks(self) -> range:
        """The virtual ranks that this worker feeds."""
        return ranks_of_worker(self.rank, self.world, self.rank_count)

    @property
    def max_ranks(self) -> int:
        """The largest number of virtual ranks that a worker feeds, reached with the fewest workers."""
        return -(-self.rank_count // (self.span[0] if self.span else self.world))

    def rows(self, batch: int) -> int:
        """Number of rows of each virtual rank, for a batch of ``batch`` rows over all workers."""
        return max(1, -(-batch // self.rank_count))

    @property
    def weight(self) -> float:
        """Weight of this worker's mean loss in the mean over workers, so that all rows of a batch count equally."""
        return len(self.own_ranks) * self.world / self.rank_count


class TrainingSpec(Protocol):
    """A specification of a training, as picklable data. The worker builds the `TrainingProgram` from it."""

    @property
    def settings(self) -> TrainerSettings: ...

    def build(self, env: WorkerContext) -> TrainingProgram: ...
