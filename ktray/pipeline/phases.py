"""The parts of a pretraining in order, and what each needs."""

from __future__ import annotations

from ktray.objectives import build_objective
from ktray.objectives.base import TEACHERS
from ktray.recipe.load import override
from ktray.recipe.schema import Recipe


def phases(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """(name, recipe) of each part; most objectives have one, without a name.

    ``agnostic_then_oriented`` learns the teacher's features on a generic set first, then its predictions on the
    recipe's own transfer set, and shares the steps between the two (G2SD, CVPR 2023).

    Args:
        recipe: resolved.
    """
    if recipe.objective.name != "agnostic_then_oriented":
        return [("", recipe)]
    steps = int(recipe.train.steps or 1)
    first = min(max(1, steps - 1), max(1, round(recipe.objective.generic_share * steps)))
    generic = {"objective.name": "agnostic", "transfer.source": "generic", "train.steps": first}
    specific = {"objective.name": "oriented", "train.steps": max(1, steps - first)}
    return [("generic", override(recipe, generic)), ("specific", override(recipe, specific))]


def targets(recipe: Recipe) -> frozenset[str]:
    """What TEACH stores for a phase's recipe."""
    return frozenset(build_objective(recipe.objective).targets_needed)


def taught(recipe: Recipe) -> bool:
    """Whether a phase learns from what a teacher says."""
    return bool(TEACHERS & targets(recipe))


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a phase loads a teacher at all: to learn from it, or to retrieve with it."""
    return taught(recipe) or recipe.transfer.source == "retrieved"
