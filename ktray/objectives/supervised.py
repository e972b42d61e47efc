"""Supervised pretraining on a labelled generic set; the baseline that most published weights are.

With a linear head on the student's features, trained beside it and dropped, the loss is the cross-entropy to the class
of the generic set, with smoothed labels (Szegedy et al., arXiv 1512.00567, section 7),

    loss = - sum_k ((1 - e) [k = y] + e / K) log softmax(head(f))_k,

averaged over the batch. With ``mixup`` > 0 images and classes of the same pair are mixed with the same weight (Zhang et
al., arXiv 1710.09412). FINETUNE then fits the task's classifier before it trains.

Use it where a labelled set near the task exists. Do not in place of a teacher that knows the task: its classes are not
the task's, and every image of it had to be labelled.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ktray.data.augment import mixup
from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, ObjectiveContext, Traits


@OBJECTIVES.register("supervised")
class SupervisedConfig(ObjectiveConfig):
    """Supervised pretraining on a labelled generic set, the baseline that most published weights are. Use it where a
    labelled set near the task exists. Do not use it in place of a teacher that knows the task: its classes are not the
    task's, and every image of it had to be labelled."""

    name: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="smoothing of the generic labels")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup on images and targets; 0 switches it off")

    sources: ClassVar[tuple[str, ...]] = ("generic",)  # supervised.data is its generic set
    order: ClassVar[int] = 60
    colour: ClassVar[str] = "#56b4e9"

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"label"}), reads="features")

    def build(self, *, hflip: float = 0.5) -> Supervised:
        return Supervised(self.label_smoothing, self.mixup)


class Supervised(Objective):
    """See the module's text. Batch: ``images`` (N, 3, H, W) float, ``label`` (N,) int64 of the generic set."""

    def __init__(self, label_smoothing: float = 0.1, mixup: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing, self.mixup = label_smoothing, mixup

    def setup(self, context: ObjectiveContext) -> None:
        """Raises ValueError when the generic set's classes are not known."""
        if context.source_classes < 2:
            raise ValueError("Supervised needs Context.source_classes")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.head = nn.Linear(context.student_dim, context.source_classes)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        targets = F.one_hot(batch["label"], self.head.out_features).float()
        images = batch["images"]
        if self.mixup > 0:
            images, targets = mixup(images, targets, self.mixup, generator)
        return {**batch, "images": images, "targets": targets}

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        logits = self.head(student_out.float()).float()
        right = (logits.detach().argmax(1) == batch["targets"].argmax(1)).float().mean()
        loss = F.cross_entropy(logits, batch["targets"], label_smoothing=self.label_smoothing)
        return {"loss": loss, "top1": right}
