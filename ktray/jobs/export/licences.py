"""Licences of the weights that a student learnt from, as far as the libraries that name the models state them."""

from __future__ import annotations

from ktray.models.teacher.families import timm
from ktray.models.teacher.families.base import UNKNOWN_LICENCE, family_of, model_of
from ktray.recipe.registries import TEACHERS
from ktray.recipe.schema import Recipe


def of_teacher(recipe: Recipe) -> str:
    """Licence of the teacher's weights.

    Args:
        recipe: as its run resolved it.
    """
    name = str(recipe.teacher.name or "")
    if recipe.teacher.checkpoint:
        return f"{UNKNOWN_LICENCE} (weights of your own, teacher.checkpoint)"
    # A run may come from a machine with families that this one lacks.
    return family_of(name).licence(model_of(name)) if name.partition(":")[0] in TEACHERS else UNKNOWN_LICENCE


def of_student(recipe: Recipe) -> str | None:
    """Licence of the weights that the student started from (students are timm models); None where it started at
    random."""
    if recipe.student.checkpoint:
        return f"{UNKNOWN_LICENCE} (weights of your own, student.checkpoint)"
    return timm.licence(str(recipe.student.name)) if recipe.student.pretrained else None
