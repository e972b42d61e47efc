"""Contrastive image-text pretraining of the student on captioned images (CLIP, arXiv 2103.00020).

The student's features and the output of a small text transformer are projected to a common space. Both are trained
together; the transformer and the projections are dropped afterwards. For unit embeddings ``v_i`` of images and ``u_j``
of captions, and a trained inverse temperature ``s``,

    P_ij = softmax_j(s v_i . u_j),  Q_ij = softmax_i(s v_i . u_j),
    loss = - mean_i sum_j Y_ij (log P_ij + log Q_ji) / 2,

over the pairs of a worker's batch (figure 3 of the paper). ``Y_ij`` is 1 for the pair itself; equal captions
share it equally, because each of them is correct. The text tower is open_clip's, with CLIP's causal attention
(section 2.4), by default much smaller than CLIP's, because captions of a small set have a small vocabulary.

Use it when there are many captions and no better information about the images. Do not use it for a task that a
text-trained teacher already knows: the student learns from thousands of pairs, the teacher has learned from millions.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ktray.objectives.base import OBJECTIVES, Batch, FlopsOf, Objective, ObjectiveConfig, ObjectiveContext, Traits

# CLIP's initial value and limit of the inverse temperature.
_START, _LIMIT = 1 / 0.07, 100.0
# Width of CLIP's attention heads.
_HEAD_WIDTH = 64


@OBJECTIVES.register("clip")
class ClipConfig(ObjectiveConfig):
    """Contrastive image-text pretraining of the student on captioned images (CLIP). Use it when there are
    many captions and no better information about the images. Do not use it for a task that a text-trained teacher
    already knows."""

    name: Literal["clip"] = "clip"

    sources: ClassVar[tuple[str, ...]] = ("generic", "retrieved")  # the images of the task have no captions
    order: ClassVar[int] = 50
    colour: ClassVar[str] = "#8a6a00"

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"text"}), reads="features")

    def build(self, *, hflip: float = 0.5) -> Clip:
        return Clip()


class Clip(Objective):
    """See the docstring of the module. Batch: ``images`` (N, 3, H, W) float, ``text`` (N, L) int64.

    Token id 0 is padding. The highest id ends a caption; the embedding of the caption is read at its position.

    Args:
        width, layers: width and depth of the text transformer.
        dim: dimension of the common space.
    """

    def __init__(self, width: int = 128, layers: int = 2, dim: int = 128) -> None:
        super().__init__()
        self.width, self.layers, self.dim = width, layers, dim
        # CLIP's length, for plans, which are computed before captions are read.
        self.text_length = 77

    def setup(self, context: ObjectiveContext) -> None:
        """Create the text tower. Raises ValueError if no captions are stored."""
        if not (context.vocabulary and context.text_length):
            raise ValueError("Clip needs Context.vocabulary and Context.text_length")
        from open_clip.transformer import TextTransformer  # slow to import

        self.text_length = context.text_length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.text = TextTransformer(
                context_length=context.text_length,
                vocab_size=context.vocabulary,
                width=self.width,
                heads=max(1, self.width // _HEAD_WIDTH),
                layers=self.layers,
                output_dim=self.dim,
            )
            self.project = nn.Linear(context.student_dim, self.dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_START)))

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        image = F.normalize(self.project(student_out.float()).float(), dim=1)
        text = F.normalize(self.text(batch["text"]).float(), dim=1)
        same = (batch["text"][:, None] == batch["text"][None]).all(2)
        targets = same / same.sum(1, keepdim=True)
        scale = self.log_scale.exp().clamp(max=_LIMIT)
        # In full precision, because logits reach 100.
        with torch.autocast(image.device.type, enabled=False):
            logits = scale * image @ text.T
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        retrieved = same.gather(1, logits.detach().argmax(1, keepdim=True)).float().mean()
        return {"loss": loss, "retrieved": retrieved, "scale": scale.detach()}

    def flops(self, train: FlopsOf, forward: FlopsOf, size: int) -> float:
        """FLOPs for one image, including the text tower: 12 width^2 weights for each layer and token, attention, and
        the projection."""
        length, width = self.text_length, self.width
        layer = 24 * length * width**2 + 4 * length**2 * width
        return train(size) + 3 * (self.layers * layer + 2 * width * self.dim)
