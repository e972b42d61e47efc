"""The Python functions on a small world: the same run as the command line, its objects, the guide and the notebook."""

import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image
from small_task import SMALL

import ktray
from ktray import recipe as recipes
from ktray.api import calls
from ktray.api.results import CompareRun, FinishedJob, TuneRun
from ktray.errors import KtrayError
from ktray.stages.evaluate import stage as evaluate
from ktray.storage.store import Store

ROOT = Path(__file__).resolve().parents[2]
CACHED = ("adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate")


def keys_of(words):
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


@pytest.fixture(scope="module")
def small(zoo_run, zoo_world):
    """Arguments of the run that the command line has made."""
    root, _ = zoo_world
    more = {"store": str(zoo_run[0]), "train.steps": 60, "data.max_bad_fraction": 0.2}
    return {"task": root / "task", "gallery": str(root / "gallery"), **keys_of(SMALL), **more}


@pytest.fixture(scope="module")
def session(tmp_path_factory, database):
    """A notebook's own MLflow, with a run that is active."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('own')}/own.db"
    Path(uri.removeprefix("sqlite:///")).write_bytes(database.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)  # so that what MLflow writes into it ends with this module
        mlflow.set_tracking_uri(uri)
        with mlflow.start_run() as active:
            yield uri, active.info.run_id
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def run(small, session, cluster):
    return ktray.distill(quiet=True, **small)


def test_it_is_the_run_of_the_command_line(run, zoo_run):
    _, _, result, _, _ = zoo_run
    assert (run.metric, run.result["metric"]) == (result["metric"]["test"], result["metric"])
    stages = {stage["name"]: stage for stage in run.result["stages"]}
    assert all(stages[name]["cached"] for name in CACHED)
    assert {s["key"] for s in run.result["stages"]} == {s["key"] for s in result["stages"]}
    assert run.cost["flops"]["total"] == 0
    weights = [Path(folder, "student/model.safetensors").read_bytes() for folder in (run.folder, result["folder"])]
    assert weights[0] == weights[1]
    other = recipes.load(str(Path(result["folder"]) / "recipe.yaml"), [])
    assert run.recipe == other


def test_ray_and_mlflow_of_the_process_are_as_before(run, session):
    import ray

    uri, active = session
    assert ray.is_initialized()
    assert mlflow.get_tracking_uri() == uri
    assert mlflow.active_run().info.run_id == active
    client = mlflow.MlflowClient(uri)
    own = client.get_run(active)
    assert (own.info.status, own.data.params, own.data.metrics) == ("RUNNING", {}, {})
    assert client.search_runs([own.info.experiment_id])[0].info.run_id == active
    assert len(client.search_runs([own.info.experiment_id])) == 1
    # The run is logged beside it, in an experiment of its own: MLflow exports the address that the notebook set.
    assert run.result["mlflow"]["tracking_uri"] == uri
    assert client.get_run(run.result["mlflow"]["run_id"]).info.experiment_id != own.info.experiment_id


def test_the_student_is_a_timm_module_with_its_transform(run):
    student, path = run.student, run.task.test[3].uri
    assert not student.training
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student.model), is_training=False)
    with Image.open(path) as image:
        expected = transform(image.convert("RGB"))
    torch.testing.assert_close(student.transform(path), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        best = int(student.model(expected[None]).argmax())
    assert student.predict([path])[0].label == student.classes[best]


def test_confidence_on_test_is_that_of_the_students_predictions(run):
    key = next(stage["key"] for stage in run.result["stages"] if stage["name"] == "evaluate")
    rows = evaluate.load(Store(run.store).stage("evaluate", key))
    found = run.student.predict([Path(uri) for uri in rows["uri"]])
    confidence = np.array([p.probability for p in found])
    accuracy = np.array([p.label == Path(uri).parent.name for p, uri in zip(found, rows["uri"], strict=True)])
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((accuracy[bins == b] - confidence[bins == b]).sum()) for b in set(bins.tolist())]
    honesty = run.result["calibration"]
    assert honesty["ece"] == pytest.approx(sum(gaps) / len(found), abs=0.01)
    assert honesty["coverage"][0]["accuracy"] == run.result["metric"]["top1"]
    assert f"calibration error is {honesty['ece']:.1%}" in run.report.html


def test_a_notebook_shows_the_run_and_its_report(run):
    page = run.report
    frame = page._repr_html_()
    assert page.html == Path(run.folder, "report.html").read_text("utf-8")
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html')
    assert len(re.findall('"', frame)) == 4, "a quotation mark of the page would end it early"
    assert f"top-1 accuracy {run.metric:.1%} on test" in repr(run)
    assert "student" in run._repr_html_()


def test_a_run_is_opened_by_folder_and_by_id(run, small, tmp_path):
    for opened in (ktray.open_run(run.folder), ktray.open_run(run.id, store=small["store"])):
        assert (opened.folder, opened.result, opened.store) == (run.folder, run.result, small["store"])
    with pytest.raises(KtrayError, match="There is no run 'nothing'"):
        ktray.open_run("nothing", store=str(tmp_path))
    with pytest.raises(KtrayError, match=r"has no finished job: result\.json is missing"):
        FinishedJob(str(tmp_path)).cost  # noqa: B018
    with pytest.raises(KtrayError, match="has no page"):
        FinishedJob(str(tmp_path)).report  # noqa: B018


@pytest.fixture(scope="module")
def other(small):
    """The run without finetuning: it shares all stages but the last."""
    return ktray.distill(quiet=True, **{**small, "finetune.steps": 0})


def right(run):
    """By test image, whether the student predicts its class."""
    key = next(stage["key"] for stage in run.result["stages"] if stage["name"] == "evaluate")
    rows = evaluate.load(Store(run.store).stage("evaluate", key))
    student = run.student.predict([Path(uri) for uri in rows["uri"]])
    return np.array([p.label == Path(uri).parent.name for p, uri in zip(student, rows["uri"], strict=True)])


def test_two_runs_are_compared_on_the_same_images(run, other, zoo_run):
    found = run.compare(other)
    difference = right(run).astype(float) - right(other)
    assert found.lead == pytest.approx(difference.mean())
    rng = np.random.default_rng(1)
    draws = difference[rng.integers(0, len(difference), (20_000, len(difference)))].mean(1)
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    costs = [r.result["cost"]["without_cache"]["flops"] for r in (run, other)]
    assert found.flops_ratio == costs[0] / costs[1]
    assert f"leads by {100 * found.lead:+.1f} points" in repr(found)
    same = run.compare(ktray.open_run(zoo_run[2]["folder"]))
    assert (same.lead, same.low, same.high) == (0, 0, 0)


def test_runs_with_other_test_images_are_not_compared(run, tmp_path):
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**run.result, "stages": []}))
    with pytest.raises(KtrayError, match=r"test predictions of run .* are not in"):
        run.compare(ktray.Run(str(folder)))
    (folder / "result.json").write_text(json.dumps({**run.result, "metric": {**run.result["metric"], "name": "other"}}))
    (tmp_path / "stages").symlink_to(Path(run.store) / "stages")
    with pytest.raises(KtrayError, match="tested on other images, or by another metric"):
        run.compare(ktray.Run(str(folder)))


def test_an_interrupted_call_continues_in_its_run(small, run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    keys, runs = {**small, "finetune.steps": 2}, Path(run.store) / "runs"
    monkeypatch.setattr(evaluate, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ktray.distill(quiet=True, **keys)
    monkeypatch.undo()
    begun = set(runs.iterdir())
    found = ktray.distill(quiet=True, **keys)
    assert Path(found.folder) in begun
    assert set(runs.iterdir()) == begun
    (stage,) = [stage for stage in found.result["stages"] if stage["name"] == "finetune"]
    assert (stage["attempts"], stage["cached"], stage["flops"] > 0) == (1, False, True)


def test_the_transfer_set_and_the_index_of_the_run_are_found(run, small):
    chosen = ktray.curate(quiet=True, **small)
    assert chosen.table.num_rows == run.result["transfer_set"]["kept"]
    assert chosen.cost["flops"]["total"] == 0
    assert "Transfer set" in chosen.report.html
    own = {name: value for name, value in small.items() if name.split(".")[0] in ("store", "teacher", "data")}
    indexed = ktray.index(small["gallery"], quiet=True, **own)
    assert indexed.cost["flops"]["total"] == 0
    assert indexed.result["index"]["images"] > 120


def test_the_teacher_of_the_run_predicts_as_it_was_tested(run):
    images = [example.uri for example in run.task.test]
    rows = ktray.predict(run, images, quiet=True, predict={"model": "teacher"}).table.to_pandas()
    right = [Path(uri).parent.name == name for uri, name in zip(rows["uri"], rows["class"], strict=True)]
    assert len(right) == 45
    assert np.mean(right) == pytest.approx(run.result["teacher_metric"]["test"])


def test_an_export_is_that_of_the_job(run, monkeypatch):
    row = {"batch": 1, "threads": 1, "median_ms": 1.0, "p90_ms": 2.0, "runs": 10}
    monkeypatch.setattr("ktray.jobs.export.latency.measure", lambda *_: {"rows": [row], "memory_bytes": 10**6})
    monkeypatch.setattr("ktray.jobs.export.targets.base.ExportTarget.latency", lambda *_: None, raising=False)
    files = ktray.export(run, quiet=True)
    assert files.folder == f"{run.folder}/export"
    assert Path(files.folder, "student.onnx").is_file()
    assert files.result["run_id"] == run.id


@pytest.mark.parametrize("name", ["compare", "tune"])
def test_comparisons_and_searches_get_the_recipe_and_return_their_folder(name, small, tmp_path, monkeypatch):
    seen = []
    place = tmp_path / "runs" / "job"
    place.mkdir(parents=True)
    content = {"ways": [{"name": "a"}], "spent": {"flops": 5}, "winner": {"runs": ["best"]}}
    (place / "result.json").write_text(json.dumps(content))
    (place / f"{name}.html").write_text("<!doctype html>")
    module = "ktray.jobs.compare.compare" if name == "compare" else "ktray.jobs.tune.run.tune"
    monkeypatch.setattr(module, lambda recipe: seen.append(recipe) or {"folder": str(place)})
    found = getattr(calls, name)(quiet=True, budget={"wall": 5}, **small)
    assert (str(seen[0].task.data), seen[0].budget.wall, seen[0].train.steps) == (str(small["task"]), 5, 60)
    assert found.report.html == "<!doctype html>"
    if isinstance(found, CompareRun):
        assert (found.methods, found.cost) == ([{"name": "a"}], {"flops": 5})
    else:
        assert isinstance(found, TuneRun)
        assert found.winner.folder == str(tmp_path / "runs" / "best")
        content["winner"]["runs"] = []
        (place / "result.json").write_text(json.dumps(content))
        with pytest.raises(KtrayError, match="was not trained to its end"):
            TuneRun(str(place)).winner  # noqa: B018


def execute(code, small, tmp_path):
    """Run an example with the data, the store and the keys of the small run in place of its own."""
    own = {name: value for name, value in small.items() if name not in ("task", "gallery")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(nested(own)))
    data = f"{str(small['task'])!r}, gallery={small['gallery']!r}, recipe={str(tmp_path / 'small.yaml')!r}"
    for example in ('"photos", gallery="unlabelled"', '"letters"'):
        code = code.replace(example, data)
    code = code.replace('store="ktray-store"', f"store={small['store']!r}")
    space = {}
    exec(compile(code, "example", "exec"), space)
    return space


def nested(keys):
    found = {}
    for key, value in keys.items():
        *path, last = key.split(".")
        place = found
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    return found


def test_the_examples_of_the_guide_run(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/guide/python.md").read_text("utf-8")
    space = execute("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)), small, tmp_path)
    assert space["run"].metric == run.metric
    rows = space["found"].table.to_pandas()
    assert isinstance(rows, pd.DataFrame)
    assert len(rows) == 45
    accuracy = np.mean([Path(uri).parent.name == name for uri, name in zip(rows["uri"], rows["class"], strict=True)])
    assert accuracy == pytest.approx(run.metric)
    assert len(rows["embedding"][0]) == run.student.feature_dim


def test_the_notebook_is_short_and_runs(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in notebook["cells"])
    lines = [line for cell in cells for line in cell.splitlines() if line.strip()]
    assert len(lines) < 10
    *most, last = "\n".join(cells).splitlines()
    space = execute("\n".join([*most, f"labels = {last}"]), small, tmp_path)
    assert space["run"].metric == run.metric
    assert len(space["labels"]) == 4
    assert set(space["labels"]) <= set(run.student.classes)
