"""Matching of the predictions at three levels: images, pairs of images, and pairs of classes.

With the teacher's calibrated logits ``z`` and the student's logits ``s`` of N views and C classes, and the matrices
``P = softmax(z / T)`` and ``Q = softmax(s / T)`` (N, C),

    instance = T^2 * KL(P || Q), averaged over the rows                          each image, as in `oriented`
    batch    = C / N^2 * || P P^T - Q Q^T ||_F^2                                 (N, N): which images are similar
    classes  = C / N^2 * || P^T P - Q^T Q ||_F^2                                 (C, C): which classes are confused
    loss     = instance_weight * instance + batch_weight * batch + class_weight * classes.

The three levels are those of MTKD (Informatica 50(13), 2026), which matches the predictions of an adapted teacher on
unlabelled images. The two Gram matrices follow multi-level logit distillation (Jin et al., CVPR 2023). Its factors 1/N
and 1/C are replaced by C/N^2, so that neither the batch nor the number of classes changes the size of a term. Each is
of the order of 1 for confident predictions of equally frequent classes. Jin et al. also repeat each term at several
temperatures and leave out uncertain rows; this file does not. N is the batch of a worker.

With ``mixup``, images and teacher probabilities of the same pair are mixed, as in `oriented`.

Use it as an addition to oriented when classes are often confused. Do not use it with batches that are small compared
with the number of classes: the matrices then say little.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, Traits
from ktray.objectives.matching import Matching
from ktray.objectives.oriented import Oriented


@OBJECTIVES.register("mtkd")
class MtkdConfig(ObjectiveConfig):
    """Matching of the predictions at three levels: of each image, of the similarities between the images of a batch,
    and of the similarities between the classes. Use it in addition to oriented when classes are often confused. Do not
    use it when a batch has fewer images than the task has classes."""

    name: Literal["mtkd"] = "mtkd"
    instance_weight: float = Field(1.0, ge=0, description="weight of the divergence of the predictions for an image")
    batch_weight: float = Field(1.0, ge=0, description="weight of the similarities between the images of a batch")
    class_weight: float = Field(1.0, ge=0, description="weight of the similarities between the classes")
    temperature: float = Field(
        1.0, gt=0, description="temperature that softens both predictions, in addition to the fitted one"
    )
    mixup: float | None = Field(
        None, ge=0, description="alpha of mixup on images and targets; 0: no mixup; null: chosen by the kind of images"
    )

    order: ClassVar[int] = 46
    colour: ClassVar[str] = "#999933"

    @model_validator(mode="after")
    def _weighted(self) -> MtkdConfig:
        if not (self.instance_weight or self.batch_weight or self.class_weight):
            raise ValueError("instance_weight, batch_weight and class_weight are all 0: set one of them above 0")
        return self

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"logits"}), classes=True)

    def build(self, *, hflip: float = 0.5) -> Mtkd:
        weights = self.instance_weight, self.batch_weight, self.class_weight
        return Mtkd(weights, self.temperature, self.mixup or 0.0)


class Mtkd(Objective):
    """See the docstring of the module. Batch: ``images`` (N, 3, H, W) float and ``logits`` (N, C), the teacher's
    calibrated predictions. It reads logits (N, C).

    Args:
        weights: weights of instance, batch and classes.
        temperature, mixup: as in `Oriented`.
    """

    def __init__(
        self, weights: tuple[float, float, float] = (1.0, 1.0, 1.0), temperature: float = 1.0, mixup: float = 0.0
    ) -> None:
        super().__init__()
        self.weights, self.temperature = weights, temperature
        self.instance = Oriented(temperature, mixup)

    def match_with(self, matching: Matching) -> None:
        super().match_with(matching)
        self.instance.match_with(matching)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        return self.instance.prepare(batch, generator)

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        found = self.instance.loss(student_out, batch)
        # In full precision: the matrices are differences of small numbers.
        with torch.autocast(student_out.device.type, enabled=False):
            p, q = batch["targets"].float(), F.softmax(student_out.float() / self.temperature, dim=1)
            scale = q.shape[1] / len(q) ** 2
            images = scale * (p @ p.T - q @ q.T).square().sum()
            classes = scale * (p.T @ p - q.T @ q).square().sum()
        parts = {"instance": found["loss"], "batch": images, "classes": classes}
        loss = torch.stack([w * part for w, part in zip(self.weights, parts.values(), strict=True)]).sum()
        logged = {f"{name}_loss": part.detach() for name, part in parts.items()}
        return {"loss": loss, "agreement": found["agreement"], **logged}
