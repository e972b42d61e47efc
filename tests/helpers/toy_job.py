"""A training job of milliseconds that fails once, for workers to import."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from ray.exceptions import OutOfMemoryError
from torch import nn

from ktray.training.loop import TrainerSettings, TrainingProgram
from ktray.training.optimisation import decay_groups

STEPS, FAILS = 30, 20
SETTINGS = TrainerSettings(
    steps=STEPS, lr=0.05, weight_decay=0.01, warmup=0.1, ema=0.9, clip=1.0, seed=3, checkpoint_seconds=1e-6
)


class Regression(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, generator):
        return {"loss": ((self.model(batch["x"]) - batch["y"]) ** 2).mean()}


@dataclass(frozen=True)
class Toy:
    """Fails at step `FAILS` as long as ``marker`` does not exist: by dying, or with the error that is named."""

    marker: Path
    failure: str
    settings: TrainerSettings = SETTINGS

    def build(self, env):
        model = nn.Linear(4, 1)

        def batches(start, stop):
            for step in range(start, stop):
                if step == FAILS and self.failure and not self.marker.exists():
                    self.marker.write_text(str(start))
                    if self.failure == "death":
                        os._exit(7)
                    if self.failure == "memory":
                        raise OutOfMemoryError(
                            "Memory on the node (IP: 10.0.0.1) was 4.95GB used / 5.00GB limit (0.99)"
                        )
                    raise {"OSError": OSError, "ValueError": ValueError}[self.failure]("planted")
                x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
                yield {"x": x, "y": x.sum(1, keepdim=True)}

        groups = decay_groups(model, 0.01)
        return TrainingProgram(Regression(model), model, groups, batches, None, 10.0, 16, env.device)


@dataclass(frozen=True)
class Shared:
    """The same for any number of workers: each feeds its lanes' part of the batch. At step `FAILS` the last worker
    dies, as long as ``marker`` does not exist, once Ray Train has a checkpoint in ``stage``."""

    marker: Path
    stage: Path
    rows: int = 16
    settings: TrainerSettings = SETTINGS

    def build(self, env):
        env = env.divide(self.rows)
        model = nn.Linear(4, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        ranks = env.own_ranks
        mine = slice(ranks.start * env.rows(self.rows), ranks.stop * env.rows(self.rows))

        def batches(start, stop):
            for step in range(start, stop):
                if step == FAILS and env.world > 1 and env.rank == env.world - 1 and not self.marker.exists():
                    limit = time.monotonic() + 60
                    while not list(self.stage.rglob("checkpoint_manager_snapshot.json")) and time.monotonic() < limit:
                        time.sleep(0.1)
                    self.marker.write_text(str(env.world))
                    os._exit(7)
                x = torch.randn(self.rows, 4, generator=torch.Generator().manual_seed(step))
                yield {"x": x[mine], "y": x[mine].sum(1, keepdim=True)}

        groups = decay_groups(model, 0.01)
        return TrainingProgram(
            Regression(model), model, groups, batches, None, 10.0, self.rows, env.device, weight=env.weight
        )
