"""A teacher that has been taught to label every patch: image tower, linear head on patch embeddings, temperature."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ktray.models.features import freeze_idle
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.map_head import MapHead
from ktray.models.teacher.teacher import Teacher, patch_embeddings


class MapTeacher(AdaptedTeacher):
    """Predicts a class for every patch; its head is a `MapHead` on the patch embeddings of the tower's last levels."""

    FILE: ClassVar[str] = "dense_teacher.json"
    HOLDS: ClassVar[str] = "segmentation teacher"

    @classmethod
    def misfit(cls, teacher: Teacher, head: Any, outputs: int) -> str:
        wanted = teacher.level_dims(len(head.dims))
        if head.dims == wanted and len(head.weight) == outputs:
            return ""
        return (
            f"The head has {len(head.weight)} classes on maps of widths {head.dims}, {outputs} classes of this teacher "
            f"need {outputs} on {wanted}"
        )

    def head_facts(self) -> dict[str, Any]:
        about = "patch embeddings of the last levels, each L2-normalised"
        return {"input": about, "dims": self.head.dims, "l2": self.head.l2}

    @classmethod
    def empty_head(cls, facts: dict[str, Any], teacher: Teacher, outputs: int) -> MapHead:
        return MapHead(torch.zeros(outputs, sum(facts["dims"])), facts["dims"])

    def logits(self, batch: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """(N, 3, H, W) uint8, or float on the scale 0..255, to calibrated logits (N, C, h, w) float32.

        h and w are those of the finest map of patch embeddings; probabilities of pixels are the softmax of the map
        after `ktray.models.maps.resize_map`. The pooled ``embedding`` is not used.
        """
        levels = len(self.head.dims)
        return self.logits_of(patch_embeddings(self.image_tower, self.preprocess, self.source, batch, levels))

    def param_groups(self, layer_decay: float, weight_decay: float, head_scale: float) -> list[dict[str, Any]]:
        """Optimizer groups for finetuning; freezes what takes no part in `logits`, such as the layers that pool."""
        freeze_idle(self, self, self.preprocess.size[0])
        return super().param_groups(layer_decay, weight_decay, head_scale)
