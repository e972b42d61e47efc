"""Task-oriented transfer: the student matches the adapted teacher's task predictions.

For the teacher's calibrated logits ``t`` (divided by the temperature fitted on validation) and the student's
logits ``s`` of the same view,

    loss = T^2 * KL(softmax(t / T) || softmax(s / T)),

averaged over the batch (Hinton et al., arXiv 1503.02531, section 2, for the softening and the factor T^2;
Vemulapalli et al., arXiv 2311.18237, for matching predictions of the target task on an unlabeled transfer
set). With ``mixup`` > 0, images and teacher probabilities of the same pair are mixed with the same weight
(Zhang et al., arXiv 1710.09412; Beyer et al., arXiv 2106.05237, section 3, where it helps long schedules). With
``cutmix`` > 0, a box of one image is pasted into another one, and the probabilities are mixed by area (Yun et al.,
arXiv 1905.04899).

Use it when the teacher is accurate on the task, by labels or by text. Do not use it when the teacher's predictions are
near chance on validation: its features may still be good, but its predictions are not.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, Traits


@OBJECTIVES.register("oriented")
class OrientedConfig(ObjectiveConfig):
    """Task-oriented transfer: the student matches the adapted teacher's predictions for the task. Use it when the
    teacher is accurate on the task, by labels or by text. Do not use it when the teacher's predictions are near chance
    on validation."""

    name: Literal["oriented"] = "oriented"
    temperature: float = Field(
        1.0, gt=0, description="temperature that softens both predictions, in addition to the fitted one"
    )
    mixup: float | None = Field(
        None, ge=0, description="alpha of mixup on images and targets; 0: no mixup; null: chosen by the kind of images"
    )
    cutmix: float | None = Field(
        None,
        ge=0,
        description="alpha of CutMix on images and targets; 0: no CutMix; with mixup, each batch draws one of the two; "
        "null: chosen by the kind of images",
    )

    compared: ClassVar[int] = 3
    compared_by_size: ClassVar[bool] = True
    searched: ClassVar[bool] = True
    order: ClassVar[int] = 10
    colour: ClassVar[str] = "#0072b2"

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"logits"}))

    def build(self, *, hflip: float = 0.5) -> Oriented:
        return Oriented(self.temperature, self.mixup or 0.0, self.cutmix or 0.0)

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        return {"temperature": {"low": 1.0, "high": 4.0, "log": True}, "mixup": [0.0, 0.2]}


class Oriented(Objective):
    """See the docstring of the module.

    Batch: ``images`` (N, 3, H, W) float; ``logits``, the teacher's calibrated predictions: (N, C), maps (N, C, h, w),
    or other predictions of the task kind. The task kind sets how predictions are matched. The formula of the module is
    that of classes; `ktray.objectives.matching` has the others.
    """

    def __init__(self, temperature: float = 1.0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        super().__init__()
        self.temperature, self.mixup, self.cutmix = temperature, mixup, cutmix

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        targets = self.matching.targets(batch["logits"].float(), self.temperature)
        images = batch["images"]
        if self.mixup > 0 or self.cutmix > 0:
            from ktray.data.mixing import mix

            images, targets = mix(images, targets, self.mixup, self.cutmix, generator)
        return {**batch, "images": images, "targets": targets}

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return self.matching.loss(student_out, batch["targets"], self.temperature)
