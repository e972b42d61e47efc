from typing import get_args

import pytest

from ktray.objectives import Agnostic, Clip, Dino, Dual, Oriented, Scratch, Supervised, build_objective
from ktray.recipe.schema import ObjectiveConfig

KINDS = {
    "oriented": Oriented,
    "dual": Dual,
    "agnostic": Agnostic,
    "agnostic_then_oriented": Oriented,
    "clip": Clip,
    "supervised": Supervised,
    "dino": Dino,
    "scratch": Scratch,
}


@pytest.mark.parametrize("name", get_args(ObjectiveConfig.model_fields["name"].annotation))
def test_every_name_of_the_recipe_is_built(name):
    built = build_objective(ObjectiveConfig(name=name))
    assert type(built) is KINDS[name]
    assert built.name == name or name == "agnostic_then_oriented"


def test_keys_of_the_recipe_arrive():
    part = ObjectiveConfig(
        match="mse", patches=0.5, temperature=3.0, mixup=0.2, label_weight=0.3, mix=0.4, label_smoothing=0.2
    ).model_copy(update={"prototypes": 99, "local_crops": 3})
    dual = build_objective(part.model_copy(update={"name": "dual"}))
    assert (dual.distil.temperature, dual.distil.mixup, dual.label_weight, dual.mix) == (3.0, 0.2, 0.3, 0.4)
    agnostic = build_objective(part.model_copy(update={"name": "agnostic"}))
    assert (agnostic.match, agnostic.patches, agnostic.reads) == ("mse", 0.5, "map")
    supervised = build_objective(part.model_copy(update={"name": "supervised"}))
    assert (supervised.label_smoothing, supervised.mixup) == (0.2, 0.2)
    dino = build_objective(part.model_copy(update={"name": "dino"}), hflip=0.0)
    assert (dino.sizes[-1], dino.local_crops, dino.views) == (99, 3, "canvas")
    assert (dino.global_policy.hflip, dino.local_policy.hflip) == (0.0, 0.0)
