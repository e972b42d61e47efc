"""A small search end to end: interrupted before its winner and gone on with, a trial that diverges, what it leaves."""

import csv
import json

import pytest
from heard import heard
from results import check_result
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.accounting.attempts import DirLog, attempts
from ktray.errors import KtrayError
from ktray.jobs.tune import run as runs
from ktray.jobs.tune.run import tune
from ktray.recipe.tune import TuneConfig
from ktray.reporting.units import percent
from ktray.storage.store import Store

SPACE = (
    "tune.space={transfer.source: [retrieved, generic], "
    "train.lr: {choices: [0.003, 1.0e+30], when: {transfer.source: [generic]}}}"
)
BUDGET = 4e11


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    task, gallery = write_task(root / "task"), write_gallery(root / "gallery")
    data = [f"store={root / 'store'}", f"task.data={task}", f"gallery.data={gallery}", "train.steps=20"]
    search = ["tune.search=grid", "tune.rungs=[0.5, 1]", "tune.stop=none", "tune.seeds=2", "tune.parallel=1"]
    return Store(str(root / "store")), [*SMALL, *data, *search, SPACE, f"budget.flops={BUDGET}"]


@pytest.fixture(scope="module")
def done(cluster, given):
    store, keys = given
    lines: list[str] = []
    searching: list[dict] = []

    def pulled(*arguments):
        (folder,) = (store.run(name) for name in store.sub("runs").children() if "-tune-" in name)
        searching.append(folder.read_json("result.json"))
        raise KtrayError("pulled the plug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train_winner", pulled)
        with pytest.raises(KtrayError, match="plug"):
            heard(lines, tune, recipes.load(None, keys))
    (folder,) = (store.run(name) for name in store.sub("runs").children() if "-tune-" in name)
    failed = folder.read_json("result.json")
    assert (failed["status"], failed["error"]) == ("failed", "pulled the plug.")
    before = (
        searching[0],
        store.sub("stages").exists("evaluate"),
        len(store.sub("runs").children()),
    )
    found = heard(lines, tune, recipes.load(None, keys))
    return folder, found, before, lines


def test_trials_that_have_ended_are_not_done_again(given, done):
    store, _ = given
    folder, found, (before, tested, runs_before), lines = done
    assert found["run_id"] == folder.uri.rpartition("/")[2]
    assert not tested, "no trial reads the test split"
    assert check_result("tune-running", before)["state"] == "running"
    assert before["trials"] == found["trials"]
    assert before["best"]["run"] == found["winner"]["run"]
    assert len(store.sub("runs").children()) == runs_before + 2, "the winner's seeds alone are new"
    assert any("resumes after 4 trials" in line for line in lines)


def test_a_trial_that_diverges_is_marked_and_charged(done):
    _, found, _, _ = done
    assert [t["state"] for t in found["trials"]] == ["finished", "finished", "finished", "failed"]
    torn = found["trials"][3]
    assert "the loss is nan" in torn["reason"] or "the loss is inf" in torn["reason"]
    assert torn["lost"]["device_seconds"] > 0


def test_everything_is_charged_once_and_within_the_budget(given, done):
    store, _ = given
    folder, found, _, _ = done
    stages = store.sub("stages")
    made = [
        entry
        for name in stages.children()
        if name != "hygiene"  # a check of the labels, not a part of the method
        for key in stages.sub(name).children()
        for entry in attempts(DirLog(store.stage(name, key)).read())
    ]
    spent = found["budget"]["spent"]
    assert spent["flops"] == sum(e.flops for e in made) == found["sharing"]["flops"]
    assert spent["device_seconds"] == pytest.approx(sum(e.device_seconds for e in made))
    assert spent["flops"] <= BUDGET
    assert len(stages.sub("adapt").children()) == 1
    assert len(stages.sub("teach").children()) == 2, "a target cache for each transfer set"
    assert found["sharing"]["flops_times"] > 1
    assert folder.read_json("purse.json")["open"] == {}


def test_the_winner_is_tested_with_each_seed_and_is_compared_with_the_baseline(given, done):
    store, _ = given
    folder, found, _, lines = done
    winner, first = found["winner"], found["given"]
    assert winner["seeds"] == [0, 1]
    for run, test in zip(winner["runs"], winner["test_seeds"], strict=True):
        assert store.run(run).read_json("result.json")["metric"]["test"] == test
    assert winner["validation_seeds"][0] == winner["validation"], "the search's own run is its first seed"
    assert winner["validation"] >= first["validation"]
    assert winner["cost"] <= first["cost"]
    as_good = ("the baseline is in the Pareto set", "the baseline is as accurate as any other run")
    assert any(text in found["says"] for text in as_good) or winner["validation"] > first["validation"]
    assert any(found["says"] in line for line in lines)
    over = [percent(sum(winner[name]) / 2) for name in ("validation_seeds", "test_seeds")]
    assert f"over 2 seeds is {over[0]} on validation and {over[1]} ± " in found["says"]
    assert check_result("tune", json.loads(folder.read("result.json"))) == json.loads(json.dumps(found))
    assert not folder.exists("running.json")


def test_recipes_of_the_front_run_again(done):
    folder, found, _, _ = done
    names = list(folder.sub("front").names(".yaml"))
    assert len(names) == len(found["front"])
    best = recipes.load(f"{folder.path}/best.yaml", [])
    assert best.train.steps == found["winner"]["steps"]
    assert best.tune == TuneConfig()
    for name in names:
        recipes.load(f"{folder.path}/front/{name}", [])


def test_the_page_opens_alone_and_holds_the_numbers(done):
    folder, found, _, _ = done
    html = folder.read("tune.html").decode()
    assert "http" not in html
    assert f"{found['winner']['validation']:.1%}" in html
    assert "the loss is" in html
    rows = list(csv.DictReader(folder.read("tune.csv").decode().splitlines()))
    points = [p for t in found["trials"] for p in t["points"]]
    assert [float(r["validation"]) for r in rows] == [p["validation"] for p in points]
    assert {r["run"] for r in rows if r["pareto"] == "True"} == {p["run"] for p in found["front"]}
    for name in ("tune.png", "tune-parallel.png"):
        assert folder.read(name)[:4] == b"\x89PNG"


def test_mlflow_has_a_run_with_one_for_each_trial(done):
    from mlflow import MlflowClient

    _, found, _, lines = done
    client = MlflowClient(tracking_uri=found["mlflow"]["tracking_uri"])
    parent = client.get_run(found["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["test.top1"] == pytest.approx(found["winner"]["test"])
    assert "tune.html" in {a.path for a in client.list_artifacts(parent.info.run_id)}
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    by_name = {c.info.run_name: c for c in children}
    assert set(by_name) == {"baseline", "trial 1", "trial 2", "trial 3"}
    for trial in found["trials"][1:3]:
        child = by_name[f"trial {trial['number']}"]
        assert child.data.metrics["val.top1"] == pytest.approx(trial["points"][-1]["validation"])
        assert child.data.params["transfer.source"] == trial["params"]["transfer.source"]
    assert by_name["trial 3"].data.tags["state"] == "failed"
    assert any(line.startswith("chart     mlflow ui ") for line in lines)


def test_a_budget_that_does_not_allow_the_baseline_says_so(cluster, given):
    _, keys = given
    with pytest.raises(KtrayError, match="does not allow one run of the baseline"):
        tune(recipes.load(None, [*keys, "budget.flops=1e6", "seed=7", "tune.seed=1"]))
