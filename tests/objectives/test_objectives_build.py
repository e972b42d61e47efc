import pytest

from ktray.objectives.agnostic import Agnostic
from ktray.objectives.clip import Clip
from ktray.objectives.consistency import Consistency
from ktray.objectives.dino import Dino
from ktray.objectives.dual import Dual
from ktray.objectives.mtkd import Mtkd
from ktray.objectives.oriented import Oriented
from ktray.objectives.oriented_features import OrientedFeatures
from ktray.objectives.probe import Probe
from ktray.objectives.scratch import Scratch
from ktray.objectives.specmatch import Specmatch
from ktray.objectives.supervised import Supervised
from ktray.recipe.choice import chosen, objectives
from ktray.recipe.registries import OBJECTIVES

KINDS = {
    "oriented": Oriented,
    "oriented_features": OrientedFeatures,
    "mtkd": Mtkd,
    "specmatch": Specmatch,
    "consistency": Consistency,
    "dual": Dual,
    "agnostic": Agnostic,
    "agnostic_then_oriented": Oriented,
    "clip": Clip,
    "supervised": Supervised,
    "dino": Dino,
    "scratch": Scratch,
    "probe": Probe,
}


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_name_of_the_recipe_is_built(name):
    section = chosen({"name": name})
    assert type(section.build()) is KINDS[name]
    assert section.name == type(section).objective_name() == name


def test_keys_of_the_recipe_arrive():
    dual = chosen({"name": "dual", "temperature": 3.0, "mixup": 0.2, "label_weight": 0.3, "mix": 0.4}).build()
    assert (dual.distil.temperature, dual.distil.mixup, dual.label_weight, dual.mix) == (3.0, 0.2, 0.3, 0.4)
    section = chosen({"name": "agnostic", "match": "mse", "patches": 0.5})
    assert (section.build().match, section.build().patches, section.traits.reads) == ("mse", 0.5, "map")
    supervised = chosen({"name": "supervised", "label_smoothing": 0.2, "mixup": 0.2}).build()
    assert (supervised.label_smoothing, supervised.mixup) == (0.2, 0.2)
    section = chosen({"name": "dino", "prototypes": 99, "local_crops": 3})
    dino = section.build(hflip=0.0)
    assert (dino.sizes[-1], dino.local_crops, section.traits.views) == (99, 3, "canvas")
    assert (dino.global_policy.hflip, dino.local_policy.hflip) == (0.0, 0.0)
    two = chosen({"name": "agnostic_then_oriented", "temperature": 3.0, "mixup": 0.2}).build()
    assert (two.temperature, two.mixup) == (3.0, 0.2)


@pytest.mark.parametrize("config", objectives(), ids=lambda config: config.objective_name())
def test_an_objective_says_what_it_is(config):
    """What pictures, comparisons and --help show of it, with nothing but its defaults."""
    assert len(config.__doc__) > 100
    assert config().traits.taught == bool({"logits", "embedding"} & config().traits.targets_needed)
    assert config.comparisons(["retrieved", "generic", "target"])
    assert set(config.search_space()) <= set(config.own_fields())
    others = [other for other in objectives() if other is not config]
    assert config.colour not in {other.colour for other in others}
    assert config.order not in {other.order for other in others}
