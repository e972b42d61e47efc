"""Task-agnostic transfer: the student matches the frozen teacher's features, independently of the task.

With the teacher's embedding ``t`` of a view, the student's pooled features ``f`` and a projection
``p = Linear(LayerNorm(f))`` to the teacher's width, which is trained together with the student and then dropped,

    cosine:       1 - cos(p, t)
    mse:          mean over the D dimensions of (p - sqrt(D) t / |t|)^2
    contrastive:  InfoNCE, in both directions, over the pairs (p_i, t_i) of a worker's batch, with a trained temperature

averaged over the batch. With ``patches`` > 0, the student's last map is also matched to the teacher's patch embeddings,
position by position, with a separate projection:

    loss = loss(pooled) + patches * mean over positions of loss(position)

``mse`` with ``patches`` is Proteus (ICLR 2025: LayerNorm and a linear layer for each level, squared error on the global
and the patch features, neither labels nor logits) without its masked patches, which a convolutional student does not
have; the target is scaled to unit mean square, so that a learning rate has the same effect for every teacher.
``contrastive`` is the task-agnostic baseline of Vemulapalli et al. (arXiv 2311.18237), in the form of CLIP's loss
(arXiv 2103.00020, figure 3); its patches are matched by cosine, because neighbouring patches are no negatives. The
classifier is not trained; FINETUNE fits it first.

Use it when one pretrained student should serve many tasks, or when the teacher cannot predict the task's classes. Do
not use it when the teacher can: the small model then spends capacity on features that the task does not need.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, ObjectiveContext, Traits

Match = Literal["cosine", "mse", "contrastive"]
# CLIP's initial value and limit of the inverse temperature.
_START, _LIMIT = 1 / 0.07, 100.0


@OBJECTIVES.register("agnostic")
class AgnosticConfig(ObjectiveConfig):
    """Task-agnostic transfer: the student matches the frozen teacher's features, independently of the task. Use it when
    one pretrained student should serve many tasks, or when the teacher cannot predict the task's classes. Do not use it
    when the teacher can: the small model then spends capacity on features that the task does not need."""

    name: Literal["agnostic"] = "agnostic"
    match: Match = Field("cosine", description="loss between the features of student and teacher")
    patches: float = Field(0.0, ge=0, description="weight of the loss on patch features; 0: only pooled features")

    # The third source, target, has few images, on which features transfer worst; it is used only without a gallery.
    compared: ClassVar[int] = 2
    compared_by_size: ClassVar[bool] = True
    searched: ClassVar[bool] = True
    order: ClassVar[int] = 30
    colour: ClassVar[str] = "#d55e00"

    @property
    def traits(self) -> Traits:
        if self.patches:
            return Traits(frozenset({"embedding", "patch_embedding"}), reads="map")
        return Traits(frozenset({"embedding"}), reads="features")

    def build(self, *, hflip: float = 0.5) -> Agnostic:
        return Agnostic(self.match, self.patches)

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        return {"match": ["cosine", "mse"]}


class Agnostic(Objective):
    """See the docstring of the module.

    Batch: ``embedding`` (N, D) and, with patches, ``patch_embedding`` (N, D', h', w') of the frozen teacher, of any
    length. It reads features (N, F) and, with patches, the map (N, F', h, w).

    Args:
        match: the loss between features.
        patches: weight of the patch term; 0: no patch term.
    """

    def __init__(self, match: Match = "cosine", patches: float = 0.0) -> None:
        super().__init__()
        self.match, self.patches = match, patches

    def setup(self, context: ObjectiveContext) -> None:
        """Create the projections. Raises ValueError if a width that they need is not known."""
        if context.teacher_dim is None:
            raise ValueError("Agnostic needs Context.teacher_dim")
        if self.patches and not (context.teacher_patch_dim and context.student_map_dim):
            raise ValueError("Agnostic with patches needs Context.teacher_patch_dim and student_map_dim")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.project = _projection(context.student_dim, context.teacher_dim)
            if self.patches and context.teacher_patch_dim:
                self.project_patches = _projection(context.student_map_dim, context.teacher_patch_dim)
        if self.match == "contrastive":
            self.log_scale = nn.Parameter(torch.tensor(math.log(_START)))

    def loss(
        self, student_out: torch.Tensor | tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        pooled = student_out if isinstance(student_out, torch.Tensor) else student_out[0]
        projected, target = self.project(pooled.float()), F.normalize(batch["embedding"].float(), dim=1)
        cosine = F.cosine_similarity(projected, target, dim=1)
        if self.match == "contrastive":
            scale = self.log_scale.exp().clamp(max=_LIMIT)
            # In full precision, because logits reach 100.
            with torch.autocast(target.device.type, enabled=False):
                logits = scale * F.normalize(projected.float(), dim=1) @ target.T
            pair = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
        else:
            loss = self._by_row(projected, target)
        result = {"loss": loss, "cosine": cosine.mean().detach()}
        if self.patches and not isinstance(student_out, torch.Tensor):
            own, theirs = _same_grid(student_out[1].float(), batch["patch_embedding"].float())
            own, theirs = self.project_patches(own), F.normalize(theirs, dim=1)
            result["loss"] = loss + self.patches * self._by_row(own, theirs)
            result["patch_cosine"] = F.cosine_similarity(own, theirs, dim=1).mean().detach()
        return result

    def _by_row(self, projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean of the loss over the pairs of rows (M, D); ``target`` has unit rows."""
        if self.match == "mse":
            return F.mse_loss(projected, target * math.sqrt(target.shape[1]))
        return (1 - F.cosine_similarity(projected, target, dim=1)).mean()


def _projection(own: int, teacher: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(own), nn.Linear(own, teacher))


def _same_grid(own: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (N, F', h, w), (N, D', h', w') as rows (N h w, F'), (N h w, D'). The teacher's map is resized."""
    grid = (own.shape[2], own.shape[3])
    if theirs.shape[2] >= grid[0] and theirs.shape[3] >= grid[1]:
        theirs = F.adaptive_avg_pool2d(theirs, grid)
    else:
        theirs = F.interpolate(theirs, size=grid, mode="bilinear", align_corners=False)
    return own.movedim(1, 3).flatten(0, 2), theirs.movedim(1, 3).flatten(0, 2)
