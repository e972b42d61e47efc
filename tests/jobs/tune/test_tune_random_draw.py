"""The random draw beside the winner: its recipe, its budget, and what is said of it."""

import pytest
from toy_search import BASE, Toy

from ktray.errors import KtrayError
from ktray.jobs.tune import random_draw as module
from ktray.jobs.tune.random_draw import random_draw, sentence
from ktray.jobs.tune.records import BASELINE, TrialPoint
from ktray.jobs.tune.trial import TrialRunner

KEYS = {"transfer.source": "retrieved", "transfer.strategy": "best_first", "train.lr": 0.03, "transfer.size": 50}
RETRIEVED = [{"transfer_set": {"source": "retrieved", "kept": 37}}]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """A finished search whose baseline is the winner, and the runs that are asked for beside it."""
    toy, asked = Toy(tmp_path), []
    record = toy.records.begin({}, dict(KEYS))
    whole = {"flops": 4.0, "device_seconds": 2.0, "usd": None}
    record.points.append(
        TrialPoint(BASELINE, 0, 1.0, 90, "run-0", 0.75, 4.0, whole, {"transfer": 4.0}, 4.0, {"flops": 4.0}, 1.0)
    )

    def pipeline(recipe, debug, share, tags, trial, limit):
        assert trial, "the test split must not be read"
        asked.append(recipe)
        return {"run_id": "run-random", "metric": {"val": 0.7}}

    monkeypatch.setattr(module, "pipeline", pipeline)
    runner = TrialRunner(BASE, None, None, toy.budget, toy.records, "tune-0")
    return toy, runner, record.points[0], asked


def run(search, results=RETRIEVED):
    toy, runner, point, _ = search
    return random_draw(BASE, toy.records, toy.budget, runner, point, results)


def test_it_is_the_winners_recipe_with_as_many_random_images(search):
    row = run(search)
    assert row == {"run": "run-random", "images": 37, "validation": 0.7, "missing": None}
    (recipe,) = search[3]
    assert (recipe.transfer.source, recipe.transfer.size, recipe.train.lr) == ("generic", 37, 0.03)
    assert recipe.transfer.strategy == BASE.transfer.strategy
    assert recipe.seed == BASE.seed
    assert "+5.0 points on validation compared with 37 random images" in sentence(row, 0.75)
    assert run(search) == row
    assert len(search[3]) == 1, "a search that goes on reads it"


def test_a_winner_that_did_not_retrieve_has_none(search):
    assert run(search, [{"transfer_set": {"source": "generic", "kept": 37}}]) is None
    assert run(search, [{}]) is None
    assert not search[3]


def test_what_the_budget_refuses_or_fails_is_said(search, monkeypatch):
    monkeypatch.setattr(search[0].budget, "promise", lambda name, stages: "planned 4 FLOP, left 1 FLOP")
    row = run(search)
    assert (row["run"], row["missing"]) == (None, "planned 4 FLOP, left 1 FLOP")
    assert not search[3]
    assert "planned 4 FLOP" in sentence(row, 0.75)
    monkeypatch.undo()

    def fails(*_, **__):
        raise KtrayError("the gallery is gone", "Find it.")

    monkeypatch.setattr(module, "pipeline", fails)
    assert "the gallery is gone" in run(search)["missing"]
