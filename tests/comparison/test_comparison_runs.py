"""A small comparison end to end: equal budgets, shared stages, page, and what its numbers are made of."""

import csv
import json

import numpy as np
import pytest
from small_task import SMALL, write_gallery, write_task

from ktray import recipe
from ktray.comparison import compare
from ktray.comparison.ways import budget_steps, default_ways, recipe_of
from ktray.errors import KtrayError
from ktray.resources import plan

WAYS = "compare.ways={mse: {objective.name: agnostic, objective.match: mse}, scratch: {objective.name: scratch}}"
HERE = plan(2, 0, 1, 1, False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    root = tmp_path_factory.mktemp("comparison")
    task, gallery = write_task(root / "task"), write_gallery(root / "gallery")
    data = [f"store={root / 'store'}", f"task.data={task}", f"gallery.data={gallery}"]
    return root / "store", [*SMALL, *data, "train.steps=40", WAYS]


@pytest.fixture(scope="module")
def done(cluster, keys):
    store, given = keys
    lines: list[str] = []
    found = compare(recipe.load(None, [*given, "compare.seeds=[0, 1]"]), lines.append)
    return store, given, found, lines


def test_rows_are_the_runs(done):
    store, _, found, lines = done
    assert [w["name"] for w in found["ways"]] == ["mse", "scratch"]
    for way in found["ways"]:
        runs = [json.loads((store / "runs" / r / "result.json").read_text()) for r in way["runs"]]
        tests = [r["metric"]["test"] for r in runs]
        assert [r["seed"] for r in runs] == [0, 1]
        assert way["accuracy"] == pytest.approx(np.mean(tests))
        assert way["spread"] == pytest.approx(np.std(tests, ddof=1))
        assert way["low"] <= way["accuracy"] <= way["high"]
        assert way["flops"] == pytest.approx(np.mean([r["cost"]["without_cache"]["flops"] for r in runs]))
        assert way["steps"] == 40
    chosen = max(found["ways"], key=lambda w: w["validation"])["name"]
    assert found["chosen_on_validation"] == chosen
    assert found["spent"]["flops"] < found["spent"]["flops_without_cache"], "no stage was shared"
    assert any(line.startswith("way  ") and "95% interval" in line for line in "\n".join(lines).splitlines())


def test_files_hold_the_same_numbers(done):
    store, _, found, _ = done
    folder = store / "runs" / found["run_id"]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(found))
    with open(folder / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["accuracy"]) for r in rows] == [w["accuracy"] for w in found["ways"]]
    page = (folder / "compare.html").read_text()
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"
    for way in found["ways"]:
        assert f"{100 * way['accuracy']:.1f} ± {100 * way['spread']:.1f}%" in page
    assert "http" not in page


def test_again_it_reuses_all_and_agrees(done):
    _, given, found, _ = done
    again = compare(recipe.load(None, [*given, "compare.seeds=[0, 1]"]), lambda text: None)
    assert again["spent"]["flops"] == 0
    names = ("name", "accuracy", "low", "high", "flops", "pareto")
    assert [{n: w[n] for n in names} for w in again["ways"]] == [{n: w[n] for n in names} for w in found["ways"]]


def test_equal_flops_gives_every_way_the_first_ones_cost(keys):
    from ktray.plan import lines
    from ktray.resolve import resolve

    base = recipe.load(None, keys[1])
    planned = budget_steps(base, base.compare.ways, "flops", HERE, lambda text: None)
    assert planned["mse"][0] == 40
    assert planned["scratch"][0] > 40
    budget = planned["mse"][1]
    for name, (steps, cost) in planned.items():
        found = resolve(recipe_of(base, base.compare.ways[name], train__steps=steps), HERE, print)
        assert cost == pytest.approx(sum(line.flops for line in lines(found)))
        assert cost <= budget
        more = resolve(recipe_of(base, base.compare.ways[name], train__steps=steps + 1), HERE, print)
        assert sum(line.flops for line in lines(more)) > budget


def test_a_budget_that_a_way_cannot_meet_names_it(keys):
    base = recipe.load(None, [*keys[1], "train.steps=1"])
    ways = {"scratch": {"objective.name": "scratch"}, "dear": {"objective.name": "oriented"}}
    with pytest.raises(KtrayError, match="'dear'"):
        budget_steps(base, ways, "flops", HERE, lambda text: None)


def test_a_way_with_an_unknown_key_names_its_nearest(keys):
    base = recipe.load(None, keys[1])
    with pytest.raises(KtrayError, match=r"objective\.match"):
        recipe_of(base, {"objective.mach": "mse"})
    with pytest.raises(KtrayError, match="compare"):
        recipe_of(base, {"compare.seeds": [1]})


def test_default_ways_follow_the_data(keys):
    with_gallery = default_ways(recipe.load(None, keys[1]))
    assert len(with_gallery) == 7
    without = default_ways(recipe.load(None, ["task.data=x"]))
    assert set(without) == {"oriented, target", "agnostic, target", "scratch"}
