"""Weak-to-strong consistency: semi-supervised training of the student without a teacher.

FixMatch (Sohn et al., arXiv 2001.07685). Each batch has labelled images with classes ``y`` and unlabelled images of the
transfer set. The student predicts an unlabelled image from a weak view; where its largest probability reaches a
threshold, its class is the target for a strong view of the same image (equations 3 and 4):

    q    = softmax(student(weak)),  without a gradient
    loss = mean CE(student(labelled), y)
           + unlabelled_weight * mean [max q >= threshold] CE(student(strong), argmax q).

The mean is over all unlabelled images, those below the threshold included. The weak view is a random crop and a flip.
The strong view is another random crop of a larger range and a flip, with strong changes of brightness, contrast and
saturation and an erased rectangle. The paper's strong view has RandAugment (14 operations) and Cutout instead. Both
views are drawn on the device from the whole image, anew at each visit, and depend only on its ``view_key``. As in the
paper, the labelled images have weak views. The weak views pass through the student in training mode, in a batch of
their own.

Use it as the baseline without a teacher: the same images and labels, and what the student can teach itself. Do not use
it for the best student when a teacher is accurate on the task, with few steps (the paper: 2^20), or with unlabelled
images of other classes than those of the task.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ktray.data.augment import random_views, uniforms
from ktray.data.strong import boxes
from ktray.data.views import ViewPolicy
from ktray.objectives.base import (
    OBJECTIVES,
    Batch,
    FlopsOf,
    Normalise,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    Traits,
)

# Numbers of the views of an image at one visit, for `random_views`.
_WEAK, _STRONG, _ERASED = 0, 1, 2
# Largest changes of brightness, contrast and saturation in a strong view.
_STRONG_COLOURS = (0.6, 0.6, 0.6)
_GREY = (124.0, 116.0, 104.0)  # of the erased rectangle: ImageNet's mean


@OBJECTIVES.register("consistency")
class ConsistencyConfig(ObjectiveConfig):
    """Weak-to-strong consistency (FixMatch): semi-supervised training of the student on the labels and its own
    confident predictions, without a teacher. Use it as the baseline that shows what a teacher adds to the same images
    and labels. Do not use it with few steps, or with unlabelled images of other classes."""

    name: Literal["consistency"] = "consistency"
    threshold: float = Field(
        0.95, ge=0, le=1, description="smallest probability at which a prediction is the target of the strong view"
    )
    unlabelled_weight: float = Field(1.0, ge=0, description="weight of the loss on unlabelled images")

    # Without a teacher for retrieval first. The second row of a comparison has the images of the other objectives.
    sources: ClassVar[tuple[str, ...]] = ("generic", "retrieved", "target")
    compared: ClassVar[int] = 2
    order: ClassVar[int] = 75
    colour: ClassVar[str] = "#117733"

    @property
    def traits(self) -> Traits:
        return Traits(views="canvas", labelled=True, classes=True)

    def build(self, *, hflip: float = 0.5) -> Consistency:
        return Consistency(self.threshold, self.unlabelled_weight, hflip=hflip)

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        return {"threshold": [0.8, 0.95], "unlabelled_weight": [0.5, 1.0]}


class Consistency(Objective):
    """See the docstring of the module. Batch: ``pixels`` (N, 3, H, W) uint8, whole images, ``view_key`` (N,),
    ``label_images`` (B, 3, h, w) uint8 of the student's size, ``label_of`` (B,). It reads logits (N, C).

    Args:
        threshold, unlabelled_weight: as in the recipe.
        weak_scale, strong_scale: ranges of the area of the crops, as shares of the image.
        hflip: probability of a horizontal flip; 0 for images that a flip changes.
    """

    def __init__(
        self,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        weak_scale: tuple[float, float] = (0.5, 1.0),
        strong_scale: tuple[float, float] = (0.3, 1.0),
        hflip: float = 0.5,
    ) -> None:
        super().__init__()
        self.threshold, self.unlabelled_weight = threshold, unlabelled_weight
        brightness, contrast, saturation = _STRONG_COLOURS
        self.weak = ViewPolicy(scale=weak_scale, hflip=hflip)
        self.strong = ViewPolicy(
            scale=strong_scale, hflip=hflip, brightness=brightness, contrast=contrast, saturation=saturation
        )
        self.image_size = 0

    def setup(self, context: ObjectiveContext) -> None:
        """Raises ValueError if the size of the student's input is not known."""
        if not context.image_size:
            raise ValueError("Consistency needs Context.image_size")
        self.image_size = context.image_size

    def step(
        self, student: nn.Module, normalise: Normalise, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        weak, strong = self.views(batch["pixels"], batch["view_key"])
        with torch.no_grad():
            guessed = student(normalise(weak)).float()
        images = torch.cat([batch["label_images"].float(), strong.float()])
        return self.loss(student(normalise(images)), {**batch, "weak": guessed})

    def views(self, pixels: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weak and the strong view of whole images (N, 3, H, W) uint8, both (N, 3, size, size) uint8."""
        weak = random_views(pixels, self.weak, keys, salt=_WEAK, size=self.image_size)
        strong = random_views(pixels, self.strong, keys, salt=_STRONG, size=self.image_size)
        return weak, erase(strong, keys)

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of logits.

        Args:
            student_out: (B + N, C), of the labelled images, followed by the strong views.
            batch: ``label_of`` (B,), and ``weak`` (N, C), the logits of the weak views.

        Returns:
            ``loss``; ``label_loss``, ``unlabelled_loss``; ``confident``, the share of unlabelled images that reach the
            threshold.
        """
        labelled, strong = student_out.float().split([len(batch["label_of"]), len(batch["weak"])])
        label = F.cross_entropy(labelled, batch["label_of"])
        probability, guess = batch["weak"].float().softmax(1).max(1)
        confident = (probability >= self.threshold).float()
        unlabelled = (confident * F.cross_entropy(strong, guess, reduction="none")).mean()
        parts = {"label_loss": label.detach(), "unlabelled_loss": unlabelled.detach(), "confident": confident.mean()}
        return {"loss": label + self.unlabelled_weight * unlabelled, **parts}

    def flops(self, train: FlopsOf, forward: FlopsOf, size: int) -> float:
        """FLOPs of a strong view that is trained on, and of a weak view that is predicted."""
        return train(size) + forward(size)


def erase(views: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Views (N, 3, H, W) uint8 in which one rectangle of each, of random size and place, is grey.

    The rectangle of a view depends only on its key. It lies inside the view: sides that are too long are cut.
    """
    inside = boxes(uniforms(keys, _ERASED, 4).numpy(), *views.shape[2:])
    erased = torch.from_numpy(inside).to(views.device, non_blocking=True)[:, None]
    return torch.where(erased, _grey(views.device, views.dtype), views)


@lru_cache
def _grey(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(1, 3, 1, 1); kept, because a copy to a GPU makes the host wait."""
    return torch.tensor(_GREY, device=device).to(dtype).view(1, 3, 1, 1)
