"""The size of the windows in which a training reads the transfer set.

It is decided once per stage, because another size would change the order of the rows in a restart on other machines.
"""

from __future__ import annotations

from ktray.distributed.allocation import worker_memory
from ktray.recipe.train import TrainConfig
from ktray.stages.base import Runtime
from ktray.storage.store import Stage
from ktray.training.inputs import TargetSet
from ktray.training.window_size import window_bytes

FILE = "windows.json"


def with_windows(part: TrainConfig, taught: TargetSet, batch: int, runtime: Runtime, stage: Stage) -> TrainConfig:
    """The section with ``window_bytes``, where the recipe leaves it open.

    Args:
        taught: the rows that are read.
        batch: number of these rows in a step, over all workers.
        stage: the stage of the training, which keeps the decision.
    """
    if part.window_bytes is not None:
        return part
    if not stage.exists(FILE):
        memory = worker_memory(runtime.plan, runtime.cluster.jobs)
        each = -(-batch // runtime.plan.least)
        size = window_bytes(memory, taught.row_bytes, taught.views, each, taught.cut is not None)
        stage.write_json(FILE, {"window_bytes": size})
    return part.model_copy(update={"window_bytes": int(stage.read_json(FILE)["window_bytes"])})
