"""A run is found by id, folder or as the newest, and what is not one is told."""

import json
from pathlib import Path

import pytest
from heard import heard

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.export.run_source import find
from ktray.tasks.base import task_kind


def asked(store: Path, *overrides: str) -> recipes.Recipe:
    return recipes.load(None, [f"store={store}", *overrides])


def test_by_id_by_folder_and_the_newest(run: Path, tmp_path: Path) -> None:
    store = run.parents[1]
    (store / "runs" / "20270101-000000-compare-0000").mkdir()  # newer, and no run with a student
    lines: list[str] = []
    newest = heard(lines, find, asked(store))
    assert newest.run_id == run.name
    assert run.name in lines[0]
    for name in (run.name, str(run), f"{run}/"):
        for place in (store, tmp_path / "elsewhere"):
            if place == store or "/" in name:
                found = heard(lines, find, asked(place, f"export.run={name}"))
                assert (found.folder.uri, found.store.uri) == (str(run), str(store))
    assert len(lines) == 1
    assert newest.metric == "top1"
    assert newest.student().classes == heard(lines, newest.task).classes
    other = heard(lines, find, asked(store, "mlflow.uri=http://elsewhere:5000"))
    assert other.recipe.mlflow.uri == "http://elsewhere:5000"
    assert other.recipe.mlflow.experiment == "exp"


@pytest.mark.parametrize("name", ["20200101-000000-nothing-0000", "/nowhere/runs/one"])
def test_no_such_run(run: Path, name: str) -> None:
    with pytest.raises(KtrayError, match=f"There is no run '{name}'"):
        find(asked(run.parents[1], f"export.run={name}"))


def test_an_empty_store(tmp_path: Path) -> None:
    with pytest.raises(KtrayError, match="runs' has a student"):
        find(asked(tmp_path))


@pytest.mark.parametrize("name", ["result.json", "student/model.safetensors"])
def test_an_unfinished_run(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(KtrayError, match=f"no finished run with a student: there is no {name}"):
        find(asked(run.parents[1], f"export.run={run.name}"))


def test_a_run_that_did_not_end_says_so(run: Path) -> None:
    (run / "student" / "model.safetensors").unlink()
    failed = {"schema": 1, "run_id": run.name, "folder": str(run), "error": "no space", "remedy": "", "exit_code": 4}
    times = {"started": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:00:01Z"}
    said = {
        "interrupted": "it was interrupted in transfer; the command that started it resumes it",
        "failed": "it failed in transfer: no space",
    }
    for status, text in said.items():
        (run / "result.json").write_text(json.dumps({**failed, **times, "stage": "transfer", "status": status}))
        with pytest.raises(KtrayError, match=text):
            find(asked(run.parents[1], f"export.run={run.name}"))
    (run / "result.json").unlink()
    (run / "running.json").write_text("{}")
    with pytest.raises(KtrayError, match="still running, or it was killed"):
        find(asked(run.parents[1], f"export.run={run.name}"))


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": "x", "metric": null}'])
def test_a_damaged_result(run: Path, text: str) -> None:
    (run / "result.json").write_text(text)
    with pytest.raises(KtrayError, match=r"result\.json' is damaged"):
        find(asked(run.parents[1], f"export.run={run.name}"))


def test_a_kind_without_an_export_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(task_kind("classification")), "no_export", ("has numbers", "Load it."))
    with pytest.raises(KtrayError, match=f"Run '{run.name}' has numbers. Load it."):
        find(asked(run.parents[1]))


def test_damaged_weights(run: Path) -> None:
    weights = run / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(KtrayError, match="the student's folder"):
        find(asked(run.parents[1])).student()


def test_images_that_are_gone_or_others(run: Path, stripes: Path, tmp_path: Path) -> None:
    store = run.parents[1]
    with pytest.raises(KtrayError, match=r"cannot be read .* set task\.data to their new location"):
        find(asked(store, f"task.data={tmp_path / 'gone'}")).task()
    config = run / "student" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["pretrained_cfg"]["label_names"] = ["a", "b", "c"]
    config.write_text(json.dumps(content))
    with pytest.raises(KtrayError, match="other classes than the student"):
        find(asked(store)).task()
