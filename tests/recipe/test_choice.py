"""The section ``objective`` as a union: which keys a recipe may have, and what a new name does to them."""

import pytest

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.compare.methods import list_methods, recipe_of
from ktray.objectives.dual import DualConfig
from ktray.recipe.choice import fitting, objectives, without_transfer_set
from ktray.recipe.schema import Recipe

# The section as every ktray before wrote it: the keys of all objectives.
FLAT = """objective:
  name: {name}
  match: mse
  patches: 0.5
  generic_share: 0.25
  label_weight: 0.3
  mix: 0.4
  label_smoothing: 0.2
  prototypes: 99
  local_crops: 3
  temperature: 3.0
  mixup: 0.2
"""
OWN = {
    "oriented": {"temperature": 3.0, "mixup": 0.2},
    "dual": {"label_weight": 0.3, "mix": 0.4, "temperature": 3.0, "mixup": 0.2},
    "agnostic": {"match": "mse", "patches": 0.5},
    "agnostic_then_oriented": {
        "generic_share": 0.25,
        "match": "mse",
        "patches": 0.5,
        "temperature": 3.0,
        "mixup": 0.2,
    },
    "clip": {},
    "supervised": {"label_smoothing": 0.2, "mixup": 0.2},
    "dino": {"prototypes": 99, "local_crops": 3},
    "scratch": {},
}
# Keys that were added to these objectives later, with their defaults.
ADDED = {
    "dual": {"balance": "fixed"},
    "oriented": {"cutmix": None},
    "agnostic_then_oriented": {"cutmix": None},
}
# Objectives that were added later, with their keys.
NEWER = {
    "oriented_features": ["match", "features", "predictions", "temperature", "mixup"],
    "mtkd": ["instance_weight", "batch_weight", "class_weight", "temperature", "mixup"],
    "specmatch": ["power", "epsilon", "warmup"],
    "consistency": ["threshold", "unlabelled_weight"],
    "probe": [],
}
KEYS = {
    config.objective_name(): [*OWN.get(config.objective_name(), {}), *ADDED.get(config.objective_name(), {})]
    or NEWER.get(config.objective_name(), [])
    for config in objectives()
}


def refused(text: str, *arguments: str) -> None:
    with pytest.raises(KtrayError, match=text):
        recipes.load(None, list(arguments))


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_of_an_earlier_ktray_keeps_what_its_objective_reads(name, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("task: {data: mine}\n" + FLAT.format(name=name))
    found = recipes.load(str(file), [])
    assert found.objective.model_dump() == {"name": name, **OWN[name], **ADDED.get(name, {})}
    file.write_text(recipes.dump(found))
    assert recipes.load(str(file), []) == found


def test_every_objective_was_there_before():
    names = [config.objective_name() for config in objectives()]
    assert [name for name in names if name not in NEWER] == list(OWN)
    assert set(names) == set(OWN) | set(NEWER)


def test_the_section_is_that_of_its_objective():
    found = Recipe.model_validate({"objective": {"name": "dual", "label_weight": 0.3}})
    assert type(found.objective) is DualConfig
    assert found.objective.label_weight == 0.3
    with pytest.raises(ValueError, match=r"label_weight: Input should be less than 1"):
        Recipe.model_validate({"objective": {"name": "dual", "label_weight": 3}})


def test_mistakes_on_the_command_line_are_named():
    refused(r"objective\.prototypes belongs to dino; objective\.name is oriented", "objective.prototypes=8")
    refused(
        r"objective\.match belongs to agnostic and agnostic_then_oriented and oriented_features; .* is dual",
        "objective.name=dual",
        "objective.match=mse",
    )
    refused(r"No objective is named 'orientd'.*Did you mean 'oriented'", "objective.name=orientd")
    refused(r"Unknown recipe key 'objective\.protypes'\. Did you mean 'objective\.prototypes'", "objective.protypes=8")
    refused(r"'objective\.temperature' does not accept -1", "objective.temperature=-1")
    refused(r"No objective is named 'null'", "objective.name=null")
    refused(r"'objective\.name' does not accept None", "objective.name=")


def test_a_file_may_serve_several_objectives(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("task: {data: mine}\nobjective: {name: oriented, temperature: 2.0, patches: 1.0}\n")
    assert recipes.load(str(file), []).objective.model_dump() == {
        "name": "oriented",
        "temperature": 2.0,
        "mixup": None,
        "cutmix": None,
    }
    agnostic = recipes.load(str(file), ["objective.name=agnostic"])
    assert agnostic.objective.model_dump() == {"name": "agnostic", "match": "cosine", "patches": 1.0}
    file.write_text("task: {data: mine}\nobjective: {name: oriented, pathces: 1.0}\n")
    with pytest.raises(KtrayError, match=r"Unknown recipe key 'objective\.pathces'.*'objective\.patches'"):
        recipes.load(str(file), [])


def test_a_new_name_keeps_what_was_set_and_the_new_objective_has():
    base = recipes.load(None, ["task.data=x", "objective.mixup=0.2"])
    dual = recipes.override(base, {"objective.name": "dual"}).objective
    assert (dual.mixup, dual.temperature, dual.label_weight) == (0.2, 1.0, 0.5)
    assert recipes.override(base, {"objective.name": "dino"}).objective.own_fields() == ["prototypes", "local_crops"]
    with pytest.raises(KtrayError, match=r"objective\.mixup belongs to .*; objective\.name is dino"):
        recipes.override(base, {"objective.name": "dino", "objective.mixup": 0.2})


def test_a_key_of_the_recipe_reaches_every_compared_method_that_has_it():
    base = recipes.load(None, ["task.data=x", "objective.mixup=0.2"])
    found = {name: recipe_of(base, way.keys).objective for name, way in list_methods(base).items()}
    assert {name: one.mixup for name, one in found.items() if "mixup" in one.own_fields()} == {
        "oriented target": 0.2,
        "dual target": 0.2,
        "oriented_features target": 0.2,
        "mtkd target": 0.2,
    }
    assert "agnostic target" in found


def test_the_shipped_comparison_of_maps_matches_maps():
    base = recipes.load("shapes", [])
    ways = list_methods(base)
    named = ["oriented retrieved", "agnostic retrieved", "scratch"]
    assert [name for name in ways if not ways[name].like] == named
    assert [name for name in ways if ways[name].like] == ["oriented generic", "agnostic generic"]
    assert recipe_of(base, ways["agnostic retrieved"].keys).objective.patches == 1.0


def test_help_lists_the_keys_of_all_once_with_their_objectives():
    rows = [row for row in recipes.schema() if row[0].startswith("objective.")]
    keys = [key for key, *_ in rows]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {"objective.name"} | {f"objective.{key}" for own in KEYS.values() for key in own}
    told = {key.removeprefix("objective."): text.partition(": ")[0].split(", ") for key, _, _, text in rows[1:]}
    for key, names in told.items():
        assert names == [name for name, own in KEYS.items() if key in own]
    assert rows[0][2] == "|".join(KEYS)


def test_the_rules_are_the_same_for_a_mapping():
    raw = {"name": "oriented", "mixup": 0.1, "prototypes": 8}
    assert fitting(raw) == {"name": "oriented", "mixup": 0.1}
    with pytest.raises(KtrayError, match="belongs to dino"):
        fitting(raw, ["prototypes"])
    with pytest.raises(KtrayError, match=r"No objective has the key 'objective\.wish'"):
        fitting({**raw, "wish": 1})


def test_the_objective_without_a_transfer_set_trains_the_whole_student():
    assert without_transfer_set().name == "scratch"
    assert not without_transfer_set().traits.frozen


def test_a_strategy_is_a_name():
    assert recipes.load(None, ["transfer.strategy=diverse"]).transfer.strategy == "diverse"
    assert recipes.load(None, ["transfer.strategy={name: diverse}"]).transfer.strategy == "diverse"
    refused(r"No strategy is named 'divers' \(transfer\.strategy\).*'diverse'\?", "transfer.strategy=divers")
    refused(r"No strategy is named '3'", "transfer.strategy=3")
    refused(r"'transfer\.strategy' does not accept .*the name of a strategy", "transfer.strategy={size: 3}")
    (row,) = [row for row in recipes.schema() if row[0] == "transfer.strategy"]
    assert row[2] == "query_balanced|class_balanced|best_first|diverse|informative"


def test_of_several_files_a_strategy_is_replaced_with_its_keys(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("task: {data: mine}\ntransfer: {strategy: {name: diverse}, size: 7}\n")
    second.write_text("transfer: {strategy: {name: informative}}\n")
    found = recipes.load([str(first), str(second)], []).transfer
    assert (found.strategy, found.size) == ("informative", 7)
