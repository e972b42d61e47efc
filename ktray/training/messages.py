"""Messages of training workers and of Ray Train's controller to the driver; `ktray.stages.base.Reporter` reads them.

A message passes through the mailbox (`ktray.distributed.mailbox`), which drops the oldest messages if the driver does
not read them. The counts of images and FLOPs in `Started` and `StepProgress` are therefore totals since the first step
of the run, over all workers: if a message is lost, no count is lost. Only `TeacherFlops` is an increment, because each
worker knows only its own part.

This module imports neither torch nor Ray, as the controller and the mailbox unpickle these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ktray.reporting.heartbeat import Heartbeat


@dataclass(frozen=True)
class Started:
    """The workers start, or restart after a failure, at a step.

    Attributes:
        step: number of steps that are already done; 0 at the start of a run.
        images, flops: totals up to this step.
        workers: number of workers.
        nodes: Ray's id of the node of each worker.
    """

    step: int
    images: float
    flops: float
    workers: int = 1
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepProgress:
    """The progress of the training.

    Attributes:
        step: number of steps that are done.
        images, flops: totals up to this step.
        data_wait: the share of this attempt's time in which the first worker waited for data, 0 to 1; None: unknown.
    """

    step: int
    images: float
    flops: float
    data_wait: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation during training: ``values`` by name (loss, seconds, metrics on validation) after ``step`` steps."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class BadImages:
    """Images that a reader could not use, as (uri, reason); a reader reports each image once."""

    images: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TeacherFlops:
    """FLOPs of a teacher that runs during training: an increment since the last message of this kind."""

    flops: float


@dataclass(frozen=True)
class ControllerState:
    """A new state of Ray Train's controller: its name in lower case, and ``why`` it failed; empty if it did not."""

    state: str
    why: str = ""


LoopMessage = Started | StepProgress | CurvePoint
Message = LoopMessage | BadImages | TeacherFlops | ControllerState | Heartbeat
