"""A small comparison end to end: interrupted and gone on with, stages shared, page, and what its numbers say."""

import csv
import json

import numpy as np
import pytest
from heard import heard
from results import check_result
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.compare import compare, page, runner

WAYS = "compare.ways={mse: {objective.name: agnostic, objective.match: mse}, scratch: {objective.name: scratch}}"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("comparison")
    task, gallery = write_task(root / "task"), write_gallery(root / "gallery")
    data = [f"store={root / 'store'}", f"task.data={task}", f"gallery.data={gallery}"]
    return root / "store", [
        *SMALL,
        *data,
        "train.steps=40",
        WAYS,
        "compare.random=false",
        "compare.seeds=[0, 1]",
        "compare.parallel=1",
    ]


@pytest.fixture(scope="module")
def done(cluster, given):
    store, keys = given
    real, titles = runner.pipeline, []

    def stopped_after_two(one, *rest, **named):
        if len(titles) == 2:
            raise KtrayError("pulled the plug")
        titles.append((one.objective.name, one.seed))
        return real(one, *rest, **named)

    def counted(one, *rest, **named):
        titles.append((one.objective.name, one.seed))
        return real(one, *rest, **named)

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pipeline", stopped_after_two)
        with pytest.raises(KtrayError, match="plug"):
            heard(lines, compare, recipes.load(None, keys))
        patch.setattr(runner, "pipeline", counted)
        found = heard(lines, compare, recipes.load(None, keys))
    return store, keys, found, lines, titles


def results(store, method):
    return [check_result("distill", store / "runs" / r / "result.json") for r in method["runs"]]


def test_an_interrupted_comparison_goes_on_in_its_folder(done):
    store, _, found, _, titles = done
    # Later seeds the other way round.
    assert titles == [("agnostic", 0), ("scratch", 0), ("scratch", 1), ("agnostic", 1)]
    assert [p.name for p in (store / "runs").glob("*-compare-*")] == [found["run_id"]]
    assert not (store / "runs" / found["run_id"] / "running.json").exists()


def test_rows_are_the_runs(done):
    store, _, found, lines, _ = done
    assert [w["name"] for w in found["ways"]] == ["mse", "scratch"]
    for method in found["ways"]:
        runs = results(store, method)
        tests = [r["metric"]["test"] for r in runs]
        assert [r["seed"] for r in runs] == [0, 1]
        assert method["accuracy"] == pytest.approx(np.mean(tests))
        assert method["spread"] == pytest.approx(np.std(tests, ddof=1))
        assert method["low"] <= method["accuracy"] <= method["high"]
        assert method["flops"] == pytest.approx(np.mean([r["cost"]["without_cache"]["flops"] for r in runs]))
        assert sum(method["stages"].values()) == pytest.approx(method["flops"])
        assert method["steps"] == 40
        assert method["lr"] == 0.003
    mse, scratch = found["ways"]
    stages = mse["stages"]
    share = (stages["adapt"] + stages["index"] + stages["curate"] + stages["teach"]) / mse["flops"]
    assert mse["teacher_share"] == pytest.approx(share)
    assert 0 < share < 1
    assert scratch["teacher_share"] == 0
    assert scratch["images"] is None
    assert mse["images"] > 0
    assert mse["lead"] is None
    assert scratch["lead"][0] == pytest.approx(mse["accuracy"] - scratch["accuracy"])
    chosen = max(found["ways"], key=lambda w: w["validation"])["name"]
    assert found["chosen_on_validation"] == chosen
    assert any("95% interval" in line for line in "\n".join(lines).splitlines())


def test_what_was_spent_is_the_sum_of_the_runs(done):
    store, _, found, _, _ = done
    runs = [r for method in found["ways"] for r in results(store, method)]
    spent = found["spent"]
    assert spent["flops"] == pytest.approx(sum(r["cost"]["flops"]["total"] for r in runs))
    assert spent["flops"] < spent["flops_without_cache"], "no stage was shared"
    assert spent["ways"]["flops"] == spent["flops"]
    assert spent["search"]["flops"] == spent["calibration"]["flops"] == 0


def test_files_hold_the_same_numbers(done):
    store, _, found, _, _ = done
    folder = store / "runs" / found["run_id"]
    assert check_result("compare", folder / "result.json") == json.loads(json.dumps(found))
    with open(folder / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["accuracy"]) for r in rows] == [w["accuracy"] for w in found["ways"]]
    html = (folder / "compare.html").read_text()
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"
    for method in found["ways"]:
        assert page.accuracy(method) in html
    assert "http" not in html


def test_mlflow_has_the_comparison_beside_its_runs(done):
    from mlflow import MlflowClient

    _, _, found, lines, _ = done
    client = MlflowClient(tracking_uri=found["mlflow"]["tracking_uri"])
    run = client.get_run(found["mlflow"]["run_id"])
    assert run.data.tags["compare"] == found["run_id"]
    assert run.info.status == "FINISHED"
    for method in found["ways"]:
        assert run.data.metrics[f"{method['name']}.accuracy"] == pytest.approx(method["accuracy"])
        assert run.data.params[f"runs.{method['name']}"] == ", ".join(method["runs"])
    kept = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"compare.html", "compare.png", "compare.csv"} <= kept
    assert len(client.search_runs([run.info.experiment_id], "tags.`ktray.run` != ''")) == 5
    view = f"ktray-{found['run_id']}"
    assert f"mlflow.sharedViewState.{view}" in client.get_experiment(run.info.experiment_id).tags
    assert any(line.startswith("chart     mlflow ui ") and line.endswith(f"viewStateShareKey={view}") for line in lines)
    drawn = client.search_runs([run.info.experiment_id], f"tags.compare = '{found['run_id']}' and tags.way != ''")
    assert {(r.info.run_name, r.data.tags["way"]) for r in drawn} == {
        (f"{method}, seed {seed}", method) for method in ("mse", "scratch") for seed in (0, 1)
    }
    assert {"mlflow.user", "ray.job_id"} <= set(run.data.tags)


def test_again_it_reuses_all_and_agrees(done):
    _, keys, found, _, _ = done
    again = compare(recipes.load(None, keys))
    assert again["run_id"] != found["run_id"], "a finished comparison is left alone"
    assert again["spent"]["flops"] == 0
    names = ("name", "accuracy", "low", "high", "pareto", "stages")
    assert [{n: w[n] for n in names} for w in again["ways"]] == [{n: w[n] for n in names} for w in found["ways"]]


@pytest.mark.long
def test_learning_rates_are_searched_and_device_time_is_measured_on_validation_alone(done):
    store, keys, _, _, _ = done
    more = ["compare.equal=device_seconds", "compare.lr_search=[0.01, 1]", "compare.seeds=[0]", "compare.parallel=2"]
    lines: list[str] = []
    found = heard(lines, compare, recipes.load(None, [*keys, *more]))
    mse, scratch = found["ways"]
    assert mse["steps"] == 40
    assert scratch["steps"] > 40, "without teacher and gallery there is time for more steps"
    for method in (mse, scratch):
        assert [t["factor"] for t in method["trials"]] == [0.01, 1]
        best = max(method["trials"], key=lambda t: t["validation"])
        assert method["lr"] == best["lr"]
        assert method["validation"] == pytest.approx(best["validation"]), "the chosen trial is the way's first run"
    spent = found["spent"]
    assert spent["search"]["flops"] > 0
    assert spent["flops"] == pytest.approx(sum(spent[part]["flops"] for part in ("ways", "search", "calibration")))
    folders = {p.name: p for p in (store / "runs").iterdir()}
    ended = [json.loads((p / "result.json").read_text()) for p in folders.values() if (p / "result.json").exists()]
    tried = [r for r in ended if "ways" not in r and "test" not in r["metric"]]
    assert len(tried) == 8
    for trial in tried:
        check_result("trial", trial)
        assert not any(stage["name"] == "evaluate" for stage in trial["stages"])
        assert not (folders[trial["run_id"]] / "student").exists()
    again = heard(lines, compare, recipes.load(None, [*keys, *more]))
    assert again["spent"]["flops"] == 0
    assert [w["steps"] for w in again["ways"]] == [w["steps"] for w in found["ways"]]
