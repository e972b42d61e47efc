"""Adapted teachers for segmentation: image tower, linear head on patch embeddings, temperature."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.map_head import MapHead
from ktray.models.teacher.teacher import Teacher, patch_embeddings


class MapTeacher(AdaptedTeacher):
    """Predicts a class for every patch, with a `MapHead` on the patch embeddings of the tower's last levels."""

    FILE: ClassVar[str] = "dense_teacher.json"
    HOLDS: ClassVar[str] = "segmentation teacher"
    POOLED: ClassVar[bool] = False

    @classmethod
    def misfit(cls, teacher: Teacher, head: Any, outputs: int) -> str:
        needed = teacher.level_dims(len(head.dims))
        if head.dims == needed and len(head.weight) == outputs:
            return ""
        return (
            f"The head has {len(head.weight)} classes on maps with the widths {head.dims}, but this teacher and task "
            f"need {outputs} classes on {needed}"
        )

    def head_facts(self) -> dict[str, Any]:
        description = "patch embeddings of the last levels, each L2-normalised"
        return {"input": description, "dims": self.head.dims, "l2": self.head.l2}

    @classmethod
    def empty_head(cls, facts: dict[str, Any], teacher: Teacher, outputs: int) -> MapHead:
        return MapHead(torch.zeros(outputs, sum(facts["dims"])), facts["dims"])

    def logits(self, batch: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """(N, 3, H, W) uint8, or float on the scale 0..255, to calibrated logits (N, C, h, w) float32.

        h and w are the size of the finest map of patch embeddings. The probabilities of pixels are the softmax of the
        map after `ktray.models.maps.resize_map`. The pooled ``embedding`` is not used.
        """
        levels = len(self.head.dims)
        return self.logits_of(patch_embeddings(self.image_tower, self.preprocess, self.source, batch, levels))
