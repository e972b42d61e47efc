"""What a training run leaves: where its loop stands, and what the attempt really cost; both are in each checkpoint."""

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
        flops_per_step, images_per_step: over all workers.
        autocast: the number format of the matrix products: fp32, bfloat16 or float16.
        peak_memory_bytes: of the first worker; on a GPU the GPU's, else the process's.
        seconds: of this attempt.
        pid: of the first worker's process.
        span: the fewest and the most workers that the run was begun with; None in checkpoints of older versions.
    """

    flops_per_step: float
    images_per_step: int
    autocast: str
    peak_memory_bytes: int
    seconds: float
    pid: int
    span: tuple[int, int] | None = None

    @classmethod
    def load(cls, checkpoint: Path) -> CostReport:
        """The report in a folder of a checkpoint."""
        found = json.loads((checkpoint / REPORT).read_text())
        span = found.get("span")
        return cls(**{**found, "span": (int(span[0]), int(span[1])) if span else None})

    def save(self, checkpoint: Path) -> None:
        """Write the report into a folder of a checkpoint."""
        (checkpoint / REPORT).write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Outcome:
    """What a training run left: state of the loop, and the cost that this attempt really had."""

    state: State
    report: CostReport

    @classmethod
    def load(cls, checkpoint: Path) -> Outcome:
        """Both files of a folder of a checkpoint."""
        return cls(State.load(checkpoint), CostReport.load(checkpoint))
