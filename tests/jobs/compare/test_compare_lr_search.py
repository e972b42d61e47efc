"""The search gives each way the same trials and chooses on validation."""

import pytest

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.compare.equal_budget import EqualBudget
from ktray.jobs.compare.lr_search import search
from ktray.jobs.compare.methods import list_methods


def setting(*more):
    base = recipes.load(
        None,
        [
            "train.lr=0.02",
            "compare.ways={a: {objective.name: oriented}, b: {objective.name: agnostic, train.lr: 0.1}}",
            "compare.budgets=[0.5]",
            "compare.seeds=[7, 8]",
            "compare.lr_search=[]",
            "compare.random=false",
            *more,
        ],
    )
    methods = list_methods(base)
    return (
        base,
        methods,
        {
            name: EqualBudget(round(100 * method.share), 1.0, method.keys.get("train.lr", 0.02))
            for name, method in methods.items()
        },
    )


def test_each_way_gets_the_same_trials_and_its_best_on_validation():
    base, methods, budgets = setting("compare.lr_search=[0.5, 1, 2]")
    jobs = []

    def run(named):
        jobs.extend(r for _, r in named)
        best = {"oriented": 0.04, "agnostic": 0.05}
        # The test score would choose otherwise.
        val = [-abs(r.train.lr - best[r.objective.name]) for _, r in named]
        return [{"metric": {"val": v, "test": -v}} for v in val]

    found = search(base, methods, budgets, run)
    assert [r.train.lr for r in jobs] == pytest.approx([0.01, 0.02, 0.04, 0.05, 0.1, 0.2])
    assert {r.seed for r in jobs} == {7}
    assert {r.train.steps for r in jobs} == {100}
    assert found.lr == pytest.approx({"a": 0.04, "b": 0.05, "a, 1/2 steps": 0.04})
    assert {name: len(tried) for name, tried in found.trials.items()} == {"a": 3, "b": 3}
    assert len(found.results) == 6


def test_without_a_search_each_way_keeps_its_own():
    base, methods, budgets = setting()
    found = search(base, methods, budgets, lambda named: [])
    assert found.lr == {"a": 0.02, "b": 0.1, "a, 1/2 steps": 0.02}
    assert found.results == []


def test_a_factor_must_be_above_zero():
    base, methods, budgets = setting("compare.lr_search=[0, 1]")
    with pytest.raises(KtrayError, match="lr_search"):
        search(base, methods, budgets, lambda named: [])
