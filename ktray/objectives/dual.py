"""Two heads in one stage: the labels and the teacher's predictions each have a head on the student's features.

DHO (arXiv 2505.07675). In a shared head, the gradients of the labels and of the teacher conflict; with separate linear
heads, they meet only in the features. For features ``f`` of labelled images (classes ``y``) and of transfer views
(calibrated teacher logits ``t``),

    loss = w CE(h_CE(f), y) + (1 - w) T^2 KL(softmax(t / T) || softmax(h_KD(f) / T)).

The paper predicts with the arithmetic mixture ``a softmax(h_CE) + (1 - a) softmax(h_KD / b)`` and chooses ``a`` (0.2 to
0.5) and ``b`` (0.5) on validation. Its code uses w = 0.5, and T = 2. It also distils on the labelled images; here, they
are distilled only if they are in the transfer set.

ktray's student stays a plain timm model with one linear classifier, so it predicts with the geometric mixture, the
product of the two experts: ``softmax(a h_CE + (1 - a) h_KD / b)``, which is linear in the features.

With ``balance=gradients``, ``w`` is not the weight of the labels but their share of the gradient, as in the
gradient-guided modulation of RT-DETRv4 (arXiv 2510.25257). Both heads read the features ``F``; with the gradient ``G``
of a loss with respect to these rows, ``G^T F`` is the gradient of the loss at the last shared layer, if this layer is a
linear layer with the identity as its weights. For its norms ``g_CE`` and ``g_KD``, the weight that gives the labels the
share ``w`` of the sum of the two norms is

    w' = w g_KD / (w g_KD + (1 - w) g_CE),     loss = w' CE + (1 - w') T^2 KL.

Each step moves the weight by 1/50 of the way to ``w'`` of its batch, from ``w`` at the start, so that it follows about
50 batches. The paper compares the norms at a layer of its encoder, and once an epoch.

Use it with few labels and a teacher that is accurate on the task: there is one stage instead of two, and no FINETUNE
that could undo the transfer. Do not use it when the labels come later, or when there are many labels to train on.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ktray.objectives.base import OBJECTIVES, Batch, Normalise, Objective, ObjectiveConfig, ObjectiveContext, Traits
from ktray.objectives.matching import Matching
from ktray.objectives.oriented import Oriented, OrientedConfig

_STEP = 1 / 50  # share of the way to the balanced weight of a batch that each step goes


@OBJECTIVES.register("dual")
class DualConfig(ObjectiveConfig):
    """Two heads in one stage: the labels and the teacher's predictions each have a linear head on the student's
    features. Use it with few labels and a teacher that is accurate on the task: there is no FINETUNE that could undo
    the transfer. Do not use it when the labels come later, or when there are many."""

    name: Literal["dual"] = "dual"
    label_weight: float = Field(
        0.5, gt=0, lt=1, description="weight of the loss on labels; that of the teacher's loss is 1 minus it"
    )
    balance: Literal["fixed", "gradients"] = Field(
        "fixed", description="whether label_weight is the weight of the loss on labels, or its share of the gradient"
    )
    mix: float = Field(0.5, ge=0, le=1, description="share of the label head in the student's predictions")
    temperature: float = Field(
        1.0, gt=0, description="temperature that softens both predictions, in addition to the fitted one"
    )
    mixup: float | None = Field(
        None, ge=0, description="alpha of mixup on images and targets; 0: no mixup; null: chosen by the kind of images"
    )

    searched: ClassVar[bool] = True
    order: ClassVar[int] = 20
    colour: ClassVar[str] = "#009e73"

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"logits"}), reads="features", labelled=True, classes=True)

    def build(self, *, hflip: float = 0.5) -> Dual:
        return Dual(
            self.temperature, self.mixup or 0.0, self.label_weight, self.mix, balanced=self.balance == "gradients"
        )

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        return {**OrientedConfig.search_space(), "label_weight": [0.25, 0.5]}


class Dual(Objective):
    """See the docstring of the module. Batch: ``pixels`` and ``logits`` (N, C), ``label_images`` (B, 3, H, W),
    ``label_of`` (B,).

    Args:
        temperature, mixup: settings of the distillation loss, as in `Oriented`.
        label_weight: w, the share of the labels in the loss.
        mix: a, the share of the label head in the prediction.
        mix_temperature: b, the temperature of the distillation head in the prediction.
        balanced: whether ``label_weight`` is the share of the gradient.
    """

    weight: torch.Tensor

    def __init__(
        self,
        temperature: float = 1.0,
        mixup: float = 0.0,
        label_weight: float = 0.5,
        mix: float = 0.5,
        mix_temperature: float = 0.5,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.distil = Oriented(temperature, mixup)
        self.balanced = balanced
        if balanced:  # a buffer, so that checkpoints contain it
            self.register_buffer("weight", torch.tensor(label_weight))
        self.label_weight, self.mix, self.mix_temperature = label_weight, mix, mix_temperature

    def match_with(self, matching: Matching) -> None:
        super().match_with(matching)
        self.distil.match_with(matching)

    def setup(self, context: ObjectiveContext) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.label_head = nn.Linear(context.student_dim, context.num_classes)
            self.distil_head = nn.Linear(context.student_dim, context.num_classes)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        return self.distil.prepare(batch, generator)

    def step(
        self, student: nn.Module, normalise: Normalise, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        batch = self.prepare({**batch, "images": batch["pixels"].float()}, generator)
        images = torch.cat([batch["images"], batch["label_images"].float()])
        return self.loss(student(normalise(images)), batch)

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of ``student_out``: features (N + B, F) of the transfer views, followed by those of the labelled
        images."""
        views, labelled = student_out.float().split([len(batch["targets"]), len(batch["label_of"])])
        label = F.cross_entropy(self.label_head(labelled).float(), batch["label_of"])
        distil = self.distil.loss(self.distil_head(views), batch)
        weight: torch.Tensor | float = self.label_weight
        if self.balanced:
            weight = self.weight.clone()  # the buffer changes before the backward pass
            if self.training and torch.is_grad_enabled():
                ours, theirs = shared_gradient(label, labelled), shared_gradient(distil["loss"], views)
                self.weight.lerp_(balanced_weight(ours, theirs, self.label_weight), _STEP)
        loss = weight * label + (1 - weight) * distil["loss"]
        parts = {"label_loss": label.detach(), "distil_loss": distil["loss"].detach()}
        if self.balanced:
            parts["weight"] = self.weight.clone()
        return {"loss": loss, "agreement": distil["agreement"], **parts}

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Write the mixture of the heads into the classifier; the softmax of its output is the geometric mixture."""
        from ktray.models.student.classifier import classifier_of  # slow to import, and every recipe loads this file

        classifier = classifier_of(model)
        own, other = self.mix, (1 - self.mix) / self.mix_temperature
        weight = own * self.label_head.weight + other * self.distil_head.weight
        classifier.weight.copy_(weight.view_as(classifier.weight))
        assert classifier.bias is not None  # classifier_of has checked it
        classifier.bias.copy_(own * self.label_head.bias + other * self.distil_head.bias)


def shared_gradient(loss: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm, a scalar, of the gradient of a loss at a linear layer with the identity as its weights, whose
    output are the features (N, F) that the loss was computed from. Over the batches of all workers."""
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
    with torch.autocast(features.device.type, enabled=False):
        weights = gradient.float().T @ features.detach().float()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(weights)
        weights /= dist.get_world_size()
    return weights.norm()


def balanced_weight(label: torch.Tensor, distil: torch.Tensor, share: float) -> torch.Tensor:
    """The weight of the loss on labels with which it has the given share of the sum of the norms of both gradients; the
    share itself if both norms are 0."""
    ours, theirs = share * distil, (1 - share) * label
    return torch.where(ours + theirs > 0, ours / (ours + theirs).clamp(min=1e-30), share)
