"""The outcome of a training: the state of its loop and the measured cost of the attempt; each checkpoint has both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ktray.training.loop import State

REPORT = "report.json"


@dataclass(frozen=True)
class CostReport:
    """The file ``report.json`` of a checkpoint.

    Attributes:
        flops_per_step, images_per_step: FLOPs and images of a step, over all workers.
        autocast: the number format of the matrix products: fp32, bfloat16 or float16.
        peak_memory_bytes: peak memory of the first worker: of its GPU if it has one, else of its process.
        seconds: duration of this attempt.
        pid: process id of the first worker.
        span: minimum and maximum number of workers at the start of the run; None in checkpoints of older versions.
        compiled: as in `ktray.training.loop.TrainingProgram`.
    """

    flops_per_step: float
    images_per_step: int
    autocast: str
    peak_memory_bytes: int
    seconds: float
    pid: int
    span: tuple[int, int] | None = None
    compiled: str = ""

    @classmethod
    def load(cls, checkpoint: Path) -> CostReport:
        """Read the report from the folder of a checkpoint."""
        content = json.loads((checkpoint / REPORT).read_text())
        span = content.get("span")
        return cls(**{**content, "span": (int(span[0]), int(span[1])) if span else None})

    def save(self, checkpoint: Path) -> None:
        """Write the report into the folder of a checkpoint."""
        (checkpoint / REPORT).write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training: the state of the loop, and the measured cost of this attempt."""

    state: State
    report: CostReport

    @classmethod
    def load(cls, checkpoint: Path) -> Outcome:
        """Read both files from the folder of a checkpoint."""
        return cls(State.load(checkpoint), CostReport.load(checkpoint))
