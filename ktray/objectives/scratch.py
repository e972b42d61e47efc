"""No pretraining: the student starts from its initial weights and sees the labels alone. The floor.

Use it to learn what pretraining is worth. It needs no teacher, no transfer set and no targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktray.objectives.base import Batch, Objective, Target


class Scratch(Objective):
    """Cross-entropy on labels. Batch: ``images`` (N, 3, H, W) float, ``label`` (N,) int64."""

    name = "scratch"
    targets_needed: frozenset[Target] = frozenset()

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(student_out.float(), batch["label"])}
