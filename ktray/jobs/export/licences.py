"""Licences of the weights that a student learned from, if the libraries that provide the models state them."""

from __future__ import annotations

from ktray.models.teacher.families import timm
from ktray.models.teacher.families.base import UNKNOWN_LICENCE, family_of, model_of
from ktray.recipe.registries import TEACHERS
from ktray.recipe.schema import Recipe


def of_teacher(recipe: Recipe) -> str:
    """Return the licence of the teacher's weights.

    Args:
        recipe: the resolved recipe of the run.
    """
    name = str(recipe.teacher.name or "")
    if recipe.teacher.checkpoint:
        return f"{UNKNOWN_LICENCE} (weights of your own, teacher.checkpoint)"
    # The run may come from a machine with teacher libraries that are not installed here.
    return family_of(name).licence(model_of(name)) if name.partition(":")[0] in TEACHERS else UNKNOWN_LICENCE


def of_student(recipe: Recipe) -> str | None:
    """Return the licence of the student's initial weights (students are timm models); None if they were random."""
    if recipe.student.checkpoint:
        return f"{UNKNOWN_LICENCE} (weights of your own, student.checkpoint)"
    return timm.licence(str(recipe.student.name)) if recipe.student.pretrained is True else None
