"""Licences of the weights that a student learnt from, as far as the libraries that name the models tell them."""

from __future__ import annotations

import open_clip
import timm

from ktray.recipe.schema import Recipe

UNKNOWN = "unknown: check"


def of_teacher(recipe: Recipe) -> str:
    """Licence of the teacher's weights.

    timm's models carry theirs; open_clip names the place of the weights, and not their licence.

    Args:
        recipe: as its run resolved it.
    """
    name, teacher = str(recipe.teacher.name or ""), recipe.teacher
    if teacher.checkpoint:
        return f"{UNKNOWN} (weights of your own, teacher.checkpoint)"
    if name == "miniverse":
        return "apache-2.0 (ships with ktray, trained on drawn pictures alone)"
    library, _, model = name.partition(":")
    if library == "timm":
        return _timm(model)
    if library == "open_clip":
        architecture, _, tag = model.partition("/")
        place = (open_clip.get_pretrained_cfg(architecture, tag) or {}).get("hf_hub", "").rstrip("/")
        return f"{UNKNOWN} (the model card of {place})" if place else UNKNOWN
    return UNKNOWN


def of_student(recipe: Recipe) -> str | None:
    """Licence of the weights that the student started from; None where it started at random."""
    if recipe.student.checkpoint:
        return f"{UNKNOWN} (weights of your own, student.checkpoint)"
    return _timm(str(recipe.student.name)) if recipe.student.pretrained else None


def _timm(model: str) -> str:
    found = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return f"{found.license} (as timm tells of {model})" if found is not None and found.license else UNKNOWN
