"""Where a training worker stands, and what it is given to train."""

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
    """Where a worker stands.

    Attributes:
        read_cpus: of a task that reads for it.
        teachers, teacher_gpus, teacher_threads: the teachers that may run beside it, and what each has.
        report: posts what a reader has to say to those who watch.
        span: the fewest and the most workers that the run may have; None: as many as there are.
        virtual_ranks: that the training rows come in (`divide`); 0: one for each worker.
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
        """The same with lanes that fit the batches, rows of a step over all workers."""
        return replace(self, virtual_ranks=virtual_ranks(*(self.span or (self.world, self.world)), *batches))

    @property
    def of(self) -> int:
        """How many lanes there are."""
        return self.virtual_ranks or self.world

    @property
    def mine(self) -> range:
        """The lanes that this worker feeds."""
        return ranks_of_worker(self.rank, self.world, self.of)

    @property
    def most(self) -> int:
        """The most lanes that a worker feeds, when there are the fewest workers."""
        return -(-self.of // (self.span[0] if self.span else self.world))

    def rows(self, batch: int) -> int:
        """Of each lane, for a batch over all workers."""
        return max(1, -(-batch // self.of))

    @property
    def weight(self) -> float:
        """Of this worker's mean loss in the mean over workers, so that each row of the whole batch counts alike."""
        return len(self.mine) * self.world / self.of


class TrainingSpec(Protocol):
    """What to train, as picklable data; the worker builds it."""

    @property
    def settings(self) -> TrainerSettings: ...

    def build(self, env: WorkerContext) -> TrainingProgram: ...
