"""Ways of pretraining, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktray.objectives.agnostic import Agnostic
from ktray.objectives.base import Batch, Objective, ObjectiveContext
from ktray.objectives.clip import Clip
from ktray.objectives.dino import Dino
from ktray.objectives.dual import Dual
from ktray.objectives.oriented import Oriented
from ktray.objectives.scratch import Scratch
from ktray.objectives.supervised import Supervised

if TYPE_CHECKING:
    from ktray.recipe.schema import ObjectiveConfig

__all__ = [
    "Agnostic",
    "Batch",
    "Clip",
    "Dino",
    "Dual",
    "Objective",
    "ObjectiveContext",
    "Oriented",
    "Scratch",
    "Supervised",
    "build_objective",
]


def build_objective(part: ObjectiveConfig, *, hflip: float = 0.5) -> Objective:
    """The objective that the recipe names.

    Args:
        hflip: probability of a horizontal flip, for an objective that cuts its own views.
    """
    match part.name:
        case "oriented" | "agnostic_then_oriented":
            # Generic first is a run of its own before it; see `ktray.pipeline.run`.
            return Oriented(part.temperature, part.mixup)
        case "dual":
            return Dual(part.temperature, part.mixup, part.label_weight, part.mix)
        case "agnostic":
            return Agnostic(part.match, part.patches)
        case "clip":
            return Clip()
        case "supervised":
            return Supervised(part.label_smoothing, part.mixup)
        case "dino":
            return Dino(part.prototypes, part.local_crops, hflip=hflip)
        case "scratch":
            return Scratch()
