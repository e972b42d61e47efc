"""Values by the kind of images, on recipes without data."""

import pytest

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.pipeline.image_kinds import (
    are_photographs,
    batch_size,
    choose_augmentation,
    choose_baselines,
    choose_learning_rate,
    min_steps,
)

PHOTOS = ("task.data=/photos", "image_size=128", "student.name=mobilenetv3_small_050", "student.pretrained=false")
GLYPHS = ("task.name=letters", "image_size=32", "student.name=test_resnet", "student.pretrained=false")
START = ("student.checkpoint=/weights.safetensors",)


def resolved(*keys):
    """The recipe after all rules, and the reasons that are printed."""
    recipe, reasons = recipes.load(None, list(keys)), []

    def choose(key, value, why):
        part = recipe
        *path, name = key.split(".")
        for step in path:
            part = getattr(part, step)
        setattr(part, name, value)
        if why:
            reasons.append(key)

    for rule in (choose_augmentation, choose_learning_rate, choose_baselines):
        rule(recipe, choose)
    return recipe, reasons


def test_glyphs_stay_as_they_were_and_nothing_is_printed():
    recipe, reasons = resolved(*GLYPHS, "train.lr=null")
    assert not are_photographs(recipe)
    assert (recipe.objective.mixup, recipe.objective.cutmix, recipe.train.lr) == (0.0, 0.0, 2e-3)
    assert (recipe.baselines.scratch, recipe.baselines.start) == (True, False)
    assert min_steps(recipe)[0] == 200
    assert reasons == []


def test_photographs_from_random_weights_are_mixed_and_trained_longer_at_a_larger_rate():
    recipe, reasons = resolved(*PHOTOS, "train.lr=null")
    assert (recipe.objective.mixup, recipe.train.lr) == (0.8, 6e-3)
    assert min_steps(recipe)[0] == 2000
    assert batch_size(recipe, 0)[0] == 128
    assert reasons == ["objective.mixup", "train.lr"]


def test_a_transformer_with_random_weights_keeps_the_smaller_rate():
    recipe, _ = resolved(*PHOTOS[:2], "student.name=vit_tiny_patch16_224", "student.pretrained=false", "train.lr=null")
    assert recipe.train.lr == 2e-3


def test_photographs_from_published_weights():
    recipe, reasons = resolved(*PHOTOS, *START, "train.lr=null")
    assert (recipe.objective.mixup, recipe.train.lr) == (0.0, 5e-4)
    assert (recipe.baselines.scratch, recipe.baselines.start) == (False, True)
    assert (min_steps(recipe)[0], batch_size(recipe, 0)[0]) == (500, 64)
    assert batch_size(recipe, 2)[0] == 1024
    assert reasons == ["train.lr", "baselines.start"]


def test_what_is_given_is_kept():
    recipe, reasons = resolved(
        *PHOTOS, "objective.mixup=0", "objective.cutmix=1", "train.lr=0.01", "baselines.scratch=false"
    )
    assert (recipe.objective.mixup, recipe.objective.cutmix, recipe.train.lr) == (0, 1, 0.01)
    assert (recipe.baselines.scratch, reasons) == (False, [])


def test_a_loss_that_cannot_mix_does_not_get_mixup():
    recipe, _ = resolved(*PHOTOS, "objective.name=oriented_features", "objective.match=contrastive")
    assert recipe.objective.mixup == 0.0


@pytest.mark.parametrize(
    "keys",
    [
        ("task.kind=segmentation", "task.labels=5"),
        ("objective.name=agnostic", "objective.patches=0.5"),
    ],
)
def test_crops_of_views_are_refused_where_targets_have_positions(keys):
    with pytest.raises(
        KtrayError, match=r"train\.augment\.crop_min=0\.5 crops views, but the targets belong to positions"
    ):
        resolved(*PHOTOS, *keys, "train.augment.crop_min=0.5")
    resolved(*PHOTOS, *keys, "train.augment.photometric=1")
