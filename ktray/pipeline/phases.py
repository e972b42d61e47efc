"""The phases of pretraining in order, and what each needs."""

from __future__ import annotations

from ktray.recipe.load import override
from ktray.recipe.schema import Recipe


def phases(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """(name, recipe) of each phase. Most objectives have one phase, whose name is empty.

    Args:
        recipe: the resolved recipe.
    """
    parts = recipe.objective.phases(int(recipe.train.steps or 1))
    return [(name, override(recipe, keys) if keys else recipe) for name, keys in parts]


def taught(recipe: Recipe) -> bool:
    """Whether a phase learns from the outputs of a teacher."""
    return recipe.objective.traits.taught


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a phase loads a teacher at all: to learn from it, or to retrieve with it."""
    return taught(recipe) or recipe.transfer.source == "retrieved"
