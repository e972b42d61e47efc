"""Teachers for photographs that need no model hub: ``efficientnet-lite0``, ``-lite1`` and ``-lite2``.

They are EfficientNet-Lite models of timm, trained on ImageNet, whose weights come as Python packages
(`ktray.models.packaged`). ``efficientnet-lite0`` is installed with ktray; the extra ``photos`` adds the others.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ktray.models.packaged import EFFICIENTNET_LITE, PackagedWeights
from ktray.models.teacher.families.base import (
    UNKNOWN_LICENCE,
    ResolvedTeacher,
    TeacherParts,
    TeacherSource,
    model_of,
    not_a_name,
)
from ktray.models.teacher.families.timm import TimmFamily
from ktray.recipe.registries import TEACHERS


class PackagedFamily(TimmFamily):
    """The family of one teacher: a timm model with packaged weights. A checkpoint may replace the weights."""

    def __init__(self, weights: PackagedWeights) -> None:
        self.weights = weights
        self.syntax = weights.name

    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        if model_of(source.name):
            raise not_a_name(source.name)
        # The source, which is stored, keeps only the name: each machine finds the file in its own installation.
        checkpoint = source.checkpoint or str(self.weights.path())
        return ResolvedTeacher(source, "timm", self.weights.architecture, None, checkpoint)

    def build(self, found: ResolvedTeacher, weights: Path | None, published: bool, device: str) -> TeacherParts:
        own = weights is not None and not found.source.checkpoint
        # The names of the layers in the package are not timm's, so its file is not loaded like a checkpoint.
        parts = super().build(found, None if own else weights, False, device)
        if own:
            self.weights.load(parts.image_tower)
        return parts

    def hub_files(self, model: str) -> tuple[str, tuple[str, ...]] | None:
        return None

    def offline_size(self, model: str) -> int:
        path = self.weights.find()
        return path.stat().st_size if path else 0

    def licence(self, model: str) -> str:
        return UNKNOWN_LICENCE if model else self.weights.licence

    def untrained(self, model: str) -> nn.Module | None:
        # The real weights need no download where the package is installed, and elsewhere their absence is an error.
        return None


for _weights in EFFICIENTNET_LITE:
    TEACHERS.register(_weights.name)(PackagedFamily(_weights))
