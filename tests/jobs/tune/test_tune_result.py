"""What a search leaves while it runs and at its end, made of records that no pipeline ran for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from results import check_result
from toy_search import BASE, SPACE, Toy

from ktray.jobs.tune import result
from ktray.jobs.tune.records import BASELINE, OVER_BUDGET, TrialPoint
from ktray.storage.store import Dir


def point(trial, validation, cost, share=1.0):
    whole = {"flops": cost, "device_seconds": cost / 2, "usd": None}
    own, spent = {"transfer": cost}, {"flops": cost}
    return TrialPoint(trial, 0, share, 90, f"run-{trial}", validation, cost, whole, own, cost, spent, 1.5)


@pytest.fixture
def search(tmp_path):
    """(base, folder, search) with the baseline, a better and cheaper trial, and one that could not be paid."""
    toy = Toy(tmp_path / "trials")
    base = BASE.model_copy(deep=True)
    base.task.name, base.task.metric = "letters", "top1"
    for number, (keys, found) in enumerate(
        [({}, point(BASELINE, 0.5, 10.0)), ({"train.lr": 0.03, "train.batch_size": 16}, point(1, 0.75, 4.0))]
    ):
        record = toy.records.begin(dict(keys), dict(keys))
        assert record.number == number
        record.points.append(found)
        toy.records.close(record, "finished")
    toy.records.close(toy.records.begin({"train.lr": 0.1}, {"train.lr": 0.1}), OVER_BUDGET, "planned too much")
    return base, Dir(str(tmp_path / "run")), toy


def test_what_was_planned_for_the_trials_and_what_they_took():
    planned = {"wall": 10.0, "usd": 0.5, "flops": 1.0, "device_seconds": 10.0}
    runs = [replace(point(n, 0.5, 1.0), planned=planned, spent={"flops": 1.0, "usd": 0.25}) for n in (0, 1)]
    found = result.planned_and_taken([*runs, point(2, 0.5, 1.0)])  # an earlier version kept no plan
    assert found == {"runs": 2, "planned_seconds": 20.0, "planned_usd": 1.0, "seconds": 3.0, "usd": 0.5}
    unpriced = [replace(runs[0], spent={"flops": 1.0})]
    assert result.planned_and_taken(unpriced)["usd"] is None


def test_the_best_so_far_meets_the_schema(search, tmp_path):
    base, folder, toy = search
    reporter = result.SearchReporter(base, toy.records, toy.budget, folder, lambda record: None)
    reporter.save()
    found = check_result("tune-running", tmp_path / "run" / "result.json")
    assert found["best"]["run"] == "run-1"
    assert [t["state"] for t in found["trials"]] == ["finished", "finished", OVER_BUDGET]
    assert folder.exists(result.BEST)


def test_the_end_meets_the_schema_and_says_what_came_of_it(search, tmp_path):
    base, folder, toy = search
    worth = {"without_cache": {"flops": 4.0, "device_seconds": 2.0}}
    tested = {"seed": 0, "run_id": "run-1", "folder": "runs/run-1", "metric": {"val": 0.75, "test": 0.7}, "cost": worth}
    final = {"point": toy.records.best(None), "results": [tested], "missing": {"1": "planned too much"}}
    content = result.build(base, "tune-0", folder, toy.space, toy.records, toy.budget, final)
    where = {"tracking_uri": "sqlite:///mlflow.db", "experiment": "ktray", "run_id": "0123"}
    tracker = SimpleNamespace(
        final=lambda values: None, stored=lambda kept, name: None, flush=lambda rest: 0, info=lambda rest: where
    )
    written = result.write(content, base, folder, toy.records, toy.budget, tracker)
    found = check_result("tune", tmp_path / "run" / "result.json")
    assert found == written
    assert found["winner"]["name"] == "trial 1"
    assert found["winner"]["keys"]["train.lr"] == 0.03
    assert (found["winner"]["test"], found["winner"]["spread"]) == (0.7, None)
    assert not found["given"]["on_front"]
    assert [p["run"] for p in found["front"]] == ["run-1"]
    assert found["mlflow"] == where
    assert len(found["space"]) == len(SPACE)
    assert folder.exists("tune.html")
