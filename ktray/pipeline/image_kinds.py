"""Values that depend on the kind of images: photographs, or small drawings and tiles.

docs/measured/photographs.md has the measurements behind each value.
"""

from __future__ import annotations

from ktray.errors import KtrayError
from ktray.models.features import is_convolutional
from ktray.models.flops import on_meta
from ktray.pipeline.published import Choose
from ktray.recipe.schema import Recipe
from ktray.tasks.base import task_kind
from ktray.training.inputs import StudentSpec

DRAWING_SIDE = 64  # side of the student's input, pixels, up to which images are treated as drawings and tiles
MIXUP = 0.8
LR_RANDOM, LR_RANDOM_PHOTOGRAPHS, LR_PUBLISHED = 2e-3, 6e-3, 5e-4


def are_photographs(recipe: Recipe) -> bool:
    """Whether the task's images are treated as photographs: own data, with an input of more than `DRAWING_SIDE` px."""
    return recipe.task.data is not None and int(recipe.image_size or 0) > DRAWING_SIDE


def choose_augmentation(recipe: Recipe, choose: Choose) -> None:
    """Set the mixing of images where the recipe leaves it open, and check the strong augmentation.

    Strong augmentation stays off unless the recipe turns it on: on photographs, crops of views cost the student more
    than they gave (docs/measured/photographs.md), because a crop often shows less than the view for which the teacher
    predicted.

    Raises:
        KtrayError: crops of views are requested, but the targets belong to positions in the view.
    """
    crop_min, photos = recipe.train.augment.crop_min, are_photographs(recipe)
    if crop_min < 1 and _positional(recipe):
        raise KtrayError(
            f"train.augment.crop_min={crop_min:g} crops views, but the targets belong to positions in the view "
            f"(task.kind={recipe.task.kind}, objective.name={recipe.objective.name})",
            "Remove train.augment.crop_min, or set it to 1.",
        )
    own = recipe.objective.own_fields()
    mixed = photos and recipe.objective.may_mix and not starts_published(recipe)
    for key, value in (("mixup", MIXUP), ("cutmix", 0.0)):
        if key in own and getattr(recipe.objective, key) is None:
            on = mixed and value > 0
            why = "photographs and a random start: the views of a small set must not be learned by heart"
            choose(f"objective.{key}", value if on else 0.0, why if on else "")


def choose_learning_rate(recipe: Recipe, choose: Choose) -> None:
    """Set the learning rate where the recipe leaves it open, by the start of the student."""
    if recipe.train.lr is None:
        if starts_published(recipe):
            choose("train.lr", LR_PUBLISHED, "the student starts from published weights")
        elif are_photographs(recipe) and _is_convolutional(recipe):
            choose("train.lr", LR_RANDOM_PHOTOGRAPHS, "photographs, and a convolutional student with random weights")
        else:
            choose("train.lr", LR_RANDOM, "")


def batch_size(recipe: Recipe, gpu_workers: int) -> tuple[int, str]:
    """The number of images of a step, and the reason. ``gpu_workers`` is the number of workers with a GPU."""
    if gpu_workers:
        return 512 * gpu_workers, "GPU"
    if are_photographs(recipe) and starts_published(recipe):
        return 64, "CPU, and a student that needs few steps because it starts from published weights"
    return 128, "CPU"


def min_steps(recipe: Recipe) -> tuple[int, str]:
    """The smallest number of steps that ktray chooses for pretraining, and the kind of training that needs it."""
    if not are_photographs(recipe):
        return 200, "few images"
    return (
        (500, "photographs, published weights") if starts_published(recipe) else (2000, "photographs, random weights")
    )


def _is_convolutional(recipe: Recipe) -> bool:
    """Whether the student is convolutional. A transformer would not be stable at the larger learning rate."""
    model = on_meta(lambda: StudentSpec.of(recipe, 2).make(bare=True).model)
    return is_convolutional(model)


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
