"""Values that depend on the kind of images: photographs, or small drawings and tiles.

docs/measured/photographs.md has the measurements behind each value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ktray.errors import KtrayError
from ktray.recipe.schema import Recipe
from ktray.tasks.base import task_kind

Choose = Callable[[str, Any, str], None]  # key, value, and the reason that is printed; empty: nothing is printed

DRAWING_SIDE = 64  # side of the student's input, pixels, up to which images are treated as drawings and tiles
MIXUP = 0.8
LR_RANDOM, LR_PUBLISHED = 2e-3, 5e-4
CROP_MIN, PHOTOMETRIC, ERASE = 0.35, 1, 0.25


def are_photographs(recipe: Recipe) -> bool:
    """Whether the task's images are treated as photographs: own data, with an input of more than `DRAWING_SIDE` px."""
    return recipe.task.data is not None and int(recipe.image_size or 0) > DRAWING_SIDE


def choose_augmentation(recipe: Recipe, choose: Choose) -> None:
    """Set mixing and strong augmentation where the recipe leaves them open.

    Raises:
        KtrayError: crops of views are requested, but the targets belong to positions in the view.
    """
    part, photos = recipe.train.augment, are_photographs(recipe)
    positional = _positional(recipe)
    if positional and part.crop_min is not None and part.crop_min < 1:
        raise KtrayError(
            f"train.augment.crop_min={part.crop_min:g} crops views, but the targets belong to positions in the view "
            f"(task.kind={recipe.task.kind}, objective.name={recipe.objective.name})",
            "Remove train.augment.crop_min, or set it to 1.",
        )
    own = recipe.objective.own_fields()
    if "mixup" in own and recipe.objective.mixup is None:  # type: ignore[attr-defined]
        choose("objective.mixup", MIXUP if photos else 0.0, "photographs: many different images" if photos else "")
    if "cutmix" in own and recipe.objective.cutmix is None:  # type: ignore[attr-defined]
        choose("objective.cutmix", 0.0, "")
    crops = photos and not positional
    for key, value, off, on in (
        ("crop_min", CROP_MIN, 1.0, crops),
        ("photometric", PHOTOMETRIC, 0, photos),
        ("erase", ERASE, 0.0, crops),
    ):
        if getattr(part, key) is None:
            choose(f"train.augment.{key}", value if on else off, "photographs: each visit differs" if on else "")


def choose_learning_rate(recipe: Recipe, choose: Choose) -> None:
    """Set the learning rate where the recipe leaves it open, by the start of the student."""
    if recipe.train.lr is None:
        if starts_published(recipe):
            choose("train.lr", LR_PUBLISHED, "the student starts from published weights")
        else:
            choose("train.lr", LR_RANDOM, "")


def starts_published(recipe: Recipe) -> bool:
    """Whether the student starts from weights of another training. ``student.pretrained`` must be resolved."""
    return bool(recipe.student.pretrained or recipe.student.checkpoint)


def choose_baselines(recipe: Recipe, choose: Choose) -> None:
    """Set the baselines that the recipe leaves open, by the start of the student."""
    part, published = recipe.baselines, starts_published(recipe)
    if part.scratch == "auto":
        choose("baselines.scratch", not published, "")
    if part.start == "auto":
        choose("baselines.start", published, "the student starts from published weights" if published else "")


def _positional(recipe: Recipe) -> bool:
    """Whether the targets belong to positions in a view, so that they do not fit to a crop of it."""
    return (
        "patch_embedding" in recipe.objective.traits.targets_needed
        or task_kind(recipe.task.kind).positions(int(recipe.image_size or 0)) > 1
    )
