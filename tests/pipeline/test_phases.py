"""The parts of a pretraining are recipes of their own, and share stages with plain runs."""

import pytest

from ktray import recipe as recipes
from ktray.pipeline.phases import phases

OWN = ["objective.match=mse", "objective.patches=0.5", "objective.temperature=3.0", "objective.mixup=0.2"]


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.5, 10, (5, 5)), (0.25, 10, (2, 8)), (0.9, 2, (1, 1)), (0.5, 1, (1, 1))]
)
def test_two_phases_share_the_steps(share, steps, expected):
    name = "objective.name=agnostic_then_oriented"
    recipe = recipes.load(None, ["task.data=x", name, f"objective.generic_share={share}", f"train.steps={steps}"])
    parts = phases(recipe)
    assert [name for name, _ in parts] == ["generic", "specific"]
    assert tuple(part.train.steps for _, part in parts) == expected
    assert parts[0][1].transfer.source == "generic"
    assert parts[1][1].transfer == recipe.transfer


def test_a_phase_is_the_recipe_of_a_plain_run():
    data = ["task.data=x", "train.steps=10"]
    both = recipes.load(None, [*data, "objective.name=agnostic_then_oriented", *OWN])
    (_, generic), (_, specific) = phases(both)
    plain = recipes.load(None, ["task.data=x", "objective.name=agnostic", *OWN[:2], "transfer.source=generic"])
    assert generic == recipes.override(plain, {"train.steps": 5})
    assert specific == recipes.load(None, ["task.data=x", "train.steps=5", "objective.name=oriented", *OWN[2:]])


def test_most_objectives_have_one_phase():
    recipe = recipes.load(None, ["task.data=x", "objective.name=dual"])
    assert phases(recipe) == [("", recipe)]
