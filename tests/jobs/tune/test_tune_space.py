"""The search space: what is refused, what is drawn, and that a point and a recipe say the same."""

import itertools

import optuna
import pytest

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.tune.default_space import default_space
from ktray.jobs.tune.space import read, values_of
from ktray.recipe.schema import Recipe

BASE = recipes.override(
    Recipe(),
    {
        "train.steps": 100,
        "train.batch_size": 32,
        "train.lr": 0.002,
        "transfer.size": 60,
        "student.name": "test_resnet",
    },
)
GIVEN = {
    "objective.name": ["oriented", "dual"],
    "objective.label_weight": {"choices": [0.25, 0.5], "when": {"objective.name": ["dual"]}},
    "student": [{"name": "test_resnet", "kwargs": {"output_stride": 8}}, {"name": "test_vit", "kwargs": {}}],
    "train.lr": {"low": 1e-3, "high": 1e-1, "log": True},
    "train.steps": {"low": 50, "high": 100, "step": 25},
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trian.lr": [1]}, "Unknown recipe key 'trian.lr'. Did you mean 'train.lr'"),
        ({"train.lr": [0.1, -1]}, "train.lr"),
        ({"train.lr": {"low": 0.1, "high": 0.01}}, "invalid range from 0.1 to 0.01"),
        ({"train.lr": {"low": 0, "high": 0.01, "log": True}}, "invalid range from 0 to 0.01"),
        ({"train.lr": {"low": 0.1}}, r"Write \[a, b\]"),
        ({"train.lr": 0.1}, r"Write \[a, b\]"),
        ({"train.lr": []}, "no choices"),
        ({"train.lr": [0.1, 0.1]}, "one of them twice"),
        ({"train.steps": {"low": 1.5, "high": 9}}, "takes integers"),
        ({"teach.views": {"low": 0, "high": 3}}, "teach.views"),
        ({"objective.name": ["oriented", "wishful"]}, "objective.name"),
        ({"student": ["test_resnet"]}, "is a section"),
        ({"student": [{"size": 3}]}, "student.size"),
        ({"student": [{"name": "a"}], "student.name": ["b"]}, "twice"),
        ({"task.labels_per_class": [1, 2]}, "cannot change"),
        ({"train.lr": {"choices": [1], "when": {"objective.nam": ["dual"]}}}, "objective.name"),
        ({"train.lr": {"choices": [1], "when": {"train.ema": [0]}}, "train.ema": [0, 0.9]}, "comes after"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given, message):
    with pytest.raises(KtrayError, match=message):
        read(BASE, given)


def test_a_key_counts_only_under_its_condition():
    space = read(BASE, GIVEN)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        trial = study.ask()
        space.define(trial)
        assert ("objective.label_weight" in trial.params) == (trial.params["objective.name"] == "dual")
        assert 1e-3 <= trial.params["train.lr"] <= 1e-1
        keys = space.keys(trial.params)
        assert keys["train.steps"] in (50, 75, 100)
        assert keys["student.kwargs"] == ({"output_stride": 8} if keys["student.name"] == "test_resnet" else {})
        seen.add((keys["objective.name"], keys["student.name"], keys["train.steps"]))
        recipe = recipes.override(BASE, keys)
        assert space.keys(space.locate(values_of(recipe))) == keys, "the recipe lies where it was drawn"
    assert len(seen) == 2 * 2 * 3


def test_a_condition_on_a_key_that_is_not_searched_looks_at_the_recipe():
    given = {"objective.match": {"choices": ["cosine", "mse"], "when": {"objective.name": ["agnostic"]}}}
    assert read(BASE, given).grid() == [{}]
    agnostic = recipes.override(BASE, {"objective.name": "agnostic"})
    assert read(agnostic, given).grid() == [{"objective.match": "cosine"}, {"objective.match": "mse"}]


def test_a_key_of_some_objectives_counts_under_those_alone():
    given = {"objective.name": ["oriented", "agnostic"], "objective.match": ["cosine", "mse"]}
    space = read(BASE, given)
    found = [(p["objective.name"], p.get("objective.match")) for p in space.grid()]
    assert found == [("oriented", None), ("agnostic", "cosine"), ("agnostic", "mse")]
    for point in space.grid():
        recipe = recipes.override(BASE, space.keys(point))
        assert space.locate(values_of(recipe)) == point
    assert read(BASE, {"objective.match": ["cosine", "mse"]}).grid() == [{}]
    both = {"objective.name": ["oriented", "dual"], "objective.mixup": [0.0, 0.2]}
    assert all(not spec.when for spec in read(BASE, both).specs)
    wrong = {**given, "objective.match": {"choices": ["mse"], "when": {"objective.name": ["agnostic", "oriented"]}}}
    with pytest.raises(KtrayError, match=r"tune\.space: objective\.match belongs to agnostic"):
        read(BASE, wrong)
    with pytest.raises(KtrayError, match="comes after"):
        read(BASE, dict(reversed(list(given.items()))))
    section = {"objective": [{"name": "oriented"}, {"name": "agnostic"}], "objective.match": ["mse"]}
    assert len(read(BASE, section).grid()) == 2


def test_the_grid_is_every_combination_that_counts():
    given = {k: v for k, v in GIVEN.items() if k != "train.lr"}
    points = [(p["objective.name"], p.get("objective.label_weight"), p["student"], p["train.steps"])
              for p in read(BASE, given).grid()]  # fmt: skip
    students = {p[2] for p in points}
    objectives = [("oriented", None), ("dual", 0.25), ("dual", 0.5)]
    expected = {(*o, s, n) for o, s, n in itertools.product(objectives, students, (50, 75, 100))}
    assert len(students) == 2
    assert len(points) == len(expected)
    assert set(points) == expected
    with pytest.raises(KtrayError, match="without a step"):
        read(BASE, GIVEN).grid()


def test_a_recipe_outside_the_space_is_nowhere():
    space = read(BASE, GIVEN)
    assert space.locate(values_of(BASE)) is None, "its student has no such arguments"
    inside = recipes.override(BASE, {"student.kwargs": {"output_stride": 8}})
    assert space.locate(values_of(inside))["train.lr"] == BASE.train.lr
    assert space.locate(values_of(recipes.override(inside, {"train.lr": 0.5}))) is None
    assert space.locate(values_of(recipes.override(inside, {"train.steps": 60}))) is None


@pytest.mark.parametrize("gallery", [None, "images"])
@pytest.mark.parametrize("text", [False, True])
def test_the_default_space_is_one(gallery, text):
    base = recipes.override(BASE, {"gallery.data": gallery, "student.kwargs": {"output_stride": 8}, "teach.views": 4})
    space = read(base, default_space(base, text, on_gpu=False))
    keys = {spec.key for spec in space.specs}
    assert {"objective.name", "teacher.adapt", "student", "train.lr", "train.batch_size", "teach.views"} <= keys
    assert ("transfer.strategy" in keys) == (gallery is not None)
    assert ("transfer.queries" in keys) == (gallery is not None and text)


def test_the_recipe_that_ships_with_a_space_lies_in_it():
    base = recipes.load("letters", [])
    space = read(base, base.tune.space)
    start = recipes.override(base, {"train.steps": base.tune.steps, "objective.mixup": 0.0})  # as it is resolved
    assert space.keys(space.locate(values_of(start)))["student.kwargs"] == base.student.kwargs
