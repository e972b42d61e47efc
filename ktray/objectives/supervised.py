"""Supervised pretraining on a labelled generic set, as for most published weights.

A linear head on the student's features is trained together with the student and then dropped. The loss is the
cross-entropy with the class of the generic set, with smoothed labels (Szegedy et al., arXiv 1512.00567, section 7),

    loss = - sum_k ((1 - e) [k = y] + e / K) log softmax(head(f))_k,

averaged over the batch. With ``mixup`` > 0, images and classes of the same pair are mixed with the same weight (Zhang
et al., arXiv 1710.09412). FINETUNE first fits the task's classifier.

Use it when there is a labelled set similar to the task. Do not use it instead of a teacher that is accurate on the
task: its classes are not those of the task, and each of its images needs a label.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ktray.data.mixing import mixup
from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, ObjectiveContext, Traits


@OBJECTIVES.register("supervised")
class SupervisedConfig(ObjectiveConfig):
    """Supervised pretraining on a labelled generic set, as for most published weights. Use it when there is a labelled
    set similar to the task. Do not use it instead of a teacher that is accurate on the task: its classes are not those
    of the task, and each of its images needs a label."""

    name: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="smoothing of the labels of the generic set")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup on images and targets; 0: no mixup")

    sources: ClassVar[tuple[str, ...]] = ("generic",)  # the generic set is supervised.data
    order: ClassVar[int] = 60
    colour: ClassVar[str] = "#56b4e9"

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"label"}), reads="features")

    def build(self, *, hflip: float = 0.5) -> Supervised:
        return Supervised(self.label_smoothing, self.mixup)


class Supervised(Objective):
    """See the docstring of the module. Batch: ``images`` (N, 3, H, W) float, ``label`` (N,) int64 of the generic
    set."""

    def __init__(self, label_smoothing: float = 0.1, mixup: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing, self.mixup = label_smoothing, mixup

    def setup(self, context: ObjectiveContext) -> None:
        """Create the head. Raises ValueError if the number of classes of the generic set is not known."""
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
