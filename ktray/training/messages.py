"""What training workers, and the controller that starts them, tell the driver; `ktray.stages.base.Reporter` reads it.

A message passes through the mailbox (`ktray.distributed.mailbox`), which drops the oldest ones when nobody reads.
Counts of images and FLOPs in `Started` and `Progress` are therefore totals since the first step of the run, over all
workers: a lost message loses no count. Only `TeacherFlops` is an increment, because each worker knows its own part.

This module imports neither torch nor Ray, as the controller and the mailbox unpickle these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """Workers begin, or begin again after a failure, at a step.

    Attributes:
        step: the first step that they do is the one after it; 0 at the start of a run.
        images, flops: totals up to this step.
        workers: how many there are.
        machines: on how many nodes they run.
    """

    step: int
    images: float
    flops: float
    workers: int = 1
    machines: int = 1


@dataclass(frozen=True)
class Progress:
    """Steps are done.

    Attributes:
        step: how many.
        images, flops: totals up to this step.
        data_wait: the share of this attempt's time in which the first worker waited for data, 0 to 1; None: unknown.
    """

    step: int
    images: float
    flops: float
    data_wait: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation along the way: ``values`` by name (loss, seconds, metrics on validation) after ``step`` steps."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class BadImages:
    """Images that a reader could not use, as (uri, reason); a reader reports each image once."""

    images: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TeacherFlops:
    """FLOPs of a teacher that ran beside the training since the last message of this kind: an increment."""

    flops: float


@dataclass(frozen=True)
class ControllerState:
    """Ray Train's controller is in another state: its name in lower case; ``why`` it failed, empty if it did not."""

    state: str
    why: str = ""


LoopMessage = Started | Progress | CurvePoint
Message = LoopMessage | BadImages | TeacherFlops | ControllerState
