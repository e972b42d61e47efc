"""Task-agnostic transfer: the student matches the frozen teacher's features, whatever the task.

With the teacher's embedding ``t`` of a view, the student's pooled features ``f`` and a projection
``p = Linear(LayerNorm(f))`` to the teacher's width, which is trained beside the student and then dropped,

    cosine:       1 - cos(p, t)
    mse:          mean over the D dimensions of (p - sqrt(D) t / |t|)^2
    contrastive:  InfoNCE, both ways, over the pairs (p_i, t_i) of a worker's batch, with a trained temperature

averaged over the batch. ``mse`` is what Proteus does (ICLR 2025: LayerNorm and a linear layer, squared error on
features, neither labels nor logits), with the target scaled to unit mean square so that the learning rate means the
same for every teacher. ``contrastive`` is the task-agnostic baseline of Vemulapalli et al. (arXiv 2311.18237), in the
form of CLIP's loss (arXiv 2103.00020, figure 3). The classifier is untouched: FINETUNE fits it before it trains.

Use it when one pretrained student is to serve many tasks, or when the teacher cannot tell the task's classes. Do not
when it can: matching all that the teacher sees spends the small model's capacity on what the task does not need.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ktray.objectives.base import Batch, Context, Objective, Reads, Target

Match = Literal["cosine", "mse", "contrastive"]
# CLIP's start and limit of the inverse temperature.
_START, _LIMIT = 1 / 0.07, 100.0


class Agnostic(Objective):
    """See the module's text. Batch: ``embedding`` (N, D), the frozen teacher's, any length; reads features (N, F)."""

    name = "agnostic"
    targets_needed: frozenset[Target] = frozenset({"embedding"})
    reads: Reads = "features"

    def __init__(self, match: Match = "cosine") -> None:
        super().__init__()
        self.match = match

    def setup(self, context: Context) -> None:
        """Raises ValueError when the teacher's width is not known."""
        if context.teacher_dim is None:
            raise ValueError("Agnostic needs Context.teacher_dim")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.project = nn.Sequential(
                nn.LayerNorm(context.student_dim), nn.Linear(context.student_dim, context.teacher_dim)
            )
        if self.match == "contrastive":
            self.log_scale = nn.Parameter(torch.tensor(math.log(_START)))

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        projected, target = self.project(student_out.float()), F.normalize(batch["embedding"].float(), dim=1)
        cosine = F.cosine_similarity(projected, target, dim=1)
        if self.match == "mse":
            loss = F.mse_loss(projected, target * math.sqrt(target.shape[1]))
        elif self.match == "contrastive":
            scale = self.log_scale.exp().clamp(max=_LIMIT)
            logits = scale * F.normalize(projected, dim=1) @ target.T
            pair = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
        else:
            loss = (1 - cosine).mean()
        return {"loss": loss, "cosine": cosine.mean().detach()}
