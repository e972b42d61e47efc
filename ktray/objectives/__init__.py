"""Ways of pretraining, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktray.objectives.agnostic import Agnostic
from ktray.objectives.base import Batch, Context, Objective
from ktray.objectives.oriented import Oriented
from ktray.objectives.scratch import Scratch

if TYPE_CHECKING:
    from ktray import recipe

__all__ = ["Agnostic", "Batch", "Context", "Objective", "Oriented", "Scratch", "build_objective"]


def build_objective(part: recipe.Objective) -> Objective:
    """The objective that the recipe names."""
    if part.name == "oriented":
        return Oriented(part.temperature, part.mixup)
    if part.name == "agnostic":
        return Agnostic(part.match)
    return Scratch()
