"""The built-in task with sets of classes (scenes), cut to a few images, through predict, compare and tune."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
from heard import heard
from PIL import Image
from results import check_result
from small_task import SMALL

import ktray
from ktray import recipe as recipes
from ktray.jobs.compare import compare
from ktray.jobs.predict import run as predicting
from ktray.jobs.predict.run import closing, predict
from ktray.jobs.tune.run import tune
from ktray.miniverse import tasks
from ktray.miniverse.scenes import scene
from ktray.miniverse.vocabulary import SCENE_SHAPES
from ktray.pipeline.run import run
from ktray.stages.evaluate.stage import load
from ktray.storage.store import Store

COUNTS = {"train": 64, "val": 32, "test": 24}


def few() -> dict[str, list[tasks.DrawnExample]]:
    """The first images of each split of the built-in task."""
    number = {shape: i for i, shape in enumerate(SCENE_SHAPES)}
    drawn = {split: [scene(f"scenes-{split}", i) for i in range(count)] for split, count in COUNTS.items()}
    return {
        split: [
            tasks.DrawnExample(d.image, tuple(sorted({number[s.token] for s in d.subjects if s.token in number})))
            for d in scenes
        ]
        for split, scenes in drawn.items()
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("scenes")
    (root / "gallery").mkdir()
    for i in range(60):
        Image.fromarray(scene("scenes-gallery", i).image).save(root / "gallery" / f"{i:02d}.png")
    cut = dataclasses.replace(tasks.TASKS["scenes"], splits=few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "scenes", cut)
        keys = [f"store={root / 'store'}", "task.name=scenes", f"gallery.data={root / 'gallery'}", "train.steps=20"]
        yield root, [*SMALL, *keys, "transfer.size=40", "baselines.scratch=false"]


@pytest.fixture(scope="module")
def done(cluster: Any, given: tuple[Path, list[str]]) -> dict[str, Any]:
    return run(recipes.load(None, given[1]))


def predicted(root: Path, done: dict[str, Any], *more: str) -> tuple[dict[str, Any], pd.DataFrame]:
    keys = [f"store={root / 'store'}", f"predict.run={done['run_id']}"]
    result = predict(recipes.load(None, [*keys, *more]))
    check_result("predict", Path(result["folder"]) / "result.json")
    return result, pd.read_parquet(result["predictions"]["folder"])


def test_the_task_is_the_built_in_one(done: dict[str, Any]) -> None:
    assert (done["task"], done["metric"]["name"], done["label_budget"]) == ("scenes", "map", COUNTS["train"])
    assert set(done["metric"]["per_class"]) == set(SCENE_SHAPES)


def test_the_student_predicts_the_sets_that_its_folder_predicts(
    given: tuple[Path, list[str]], done: dict[str, Any]
) -> None:
    root = given[0]
    result, rows = predicted(root, done, f"predict.data={root / 'gallery'}")
    assert list(rows.columns) == ["uri", "classes", "probabilities"]
    assert len(rows) == result["predictions"]["images"] == 60
    student = ktray.load_student(root / "store" / "runs" / done["run_id"] / "student")
    expected = student.predict(rows["uri"].tolist())
    assert [list(labels) for labels in rows["classes"]] == [tags.labels for tags in expected]
    for found, tags in zip(rows["probabilities"], expected, strict=True):
        assert found == pytest.approx([tags.probabilities[name] for name in student.classes], abs=1e-5)
    assert len({tuple(labels) for labels in rows["classes"]}) > 1
    assert result["counts"] == {name: sum(name in labels for labels in rows["classes"]) for name in student.classes}
    sure = [
        np.mean([p if name in tags.labels else 1 - p for name, p in tags.probabilities.items()]) for tags in expected
    ]
    assert result["confidence"] == pytest.approx(np.mean(sure), abs=1e-5)
    schema = ds.dataset(result["predictions"]["folder"]).schema
    assert json.loads(schema.metadata[b"classes"]) == student.classes
    assert "predicted 60 images" in closing(result)
    again, _ = predicted(root, done, f"predict.data={root / 'gallery'}")
    assert (again["images_per_second"], again["predictions"]) == (None, result["predictions"])
    lines: list[str] = []
    keys = [f"store={root / 'store'}", f"predict.run={done['run_id']}", f"predict.data={root / 'gallery'}"]
    heard(lines, predicting.show, recipes.load(None, keys))
    assert any("8 classes" in line for line in lines)


def test_the_teacher_decides_as_it_was_tested(given: tuple[Path, list[str]], done: dict[str, Any]) -> None:
    root = given[0]
    (folder,) = (root / "store" / "miniverse").glob("*scenes*/test")
    _, rows = predicted(root, done, "predict.model=teacher", f"predict.data={folder}", "predict.embedding=true")
    (key,) = [stage["key"] for stage in done["stages"] if stage["name"] == "evaluate"]
    tested = load(Store(str(root / "store")).stage("evaluate", key))
    place = {str(uri): i for i, uri in enumerate(tested["uri"])}
    assert len(rows) == len(place) == COUNTS["test"]
    classes = ktray.load_student(root / "store" / "runs" / done["run_id"] / "student").classes
    decided = tested["teacher_decided"].astype(bool)
    assert decided.any()
    for row in rows.itertuples():
        i = place[row.uri]
        assert row.probabilities == pytest.approx(1 / (1 + np.exp(-tested["teacher"][i])), abs=1e-3)
        assert set(row.classes) == {name for name, has in zip(classes, decided[i], strict=True) if has}
    assert len(rows["embedding"][0]) > 8


@pytest.mark.long
def test_a_comparison_ends_with_its_page(given: tuple[Path, list[str]], done: dict[str, Any]) -> None:
    root, keys = given
    ways = "compare.ways={oriented: {objective.name: oriented}, scratch: {objective.name: scratch}}"
    found = compare(
        recipes.load(None, [*keys, ways, "compare.random=false", "compare.seeds=[0]", "compare.parallel=1"])
    )
    folder = root / "store" / "runs" / found["run_id"]
    check_result("compare", folder / "result.json")
    assert found["metric"] == "map"
    by_name = {way["name"]: way for way in found["ways"]}
    assert set(by_name) == {"oriented", "scratch"}
    assert all(0 < way["accuracy"] <= 1 for way in by_name.values())
    assert "mean average precision" in (folder / "compare.html").read_text("utf-8").lower()


@pytest.mark.long
def test_a_search_ends_with_a_winner(given: tuple[Path, list[str]], done: dict[str, Any]) -> None:
    root, keys = given
    space = "tune.space={train.lr: [0.003, 0.001]}"
    search = ["tune.search=grid", "tune.rungs=[1]", "tune.stop=none", "tune.seeds=1", "tune.parallel=1"]
    found = tune(recipes.load(None, [*keys, space, *search, "budget.flops=1e13"]))
    check_result("tune", root / "store" / "runs" / found["run_id"] / "result.json")
    assert found["metric"] == "map"
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 3  # with the baseline
    assert 0 < found["winner"]["test"] <= 1
