"""jobs/curate.py curate.suggest: what to label next, the labels that come back, and what cannot be suggested."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heard import heard
from PIL import Image
from results import check_result
from scipy.spatial.distance import jensenshannon
from small_task import CLASSES, SMALL, picture, write_task

from ktray import recipe as recipes
from ktray.api.results import CurateRun
from ktray.data.labelled.read import read_labelled
from ktray.errors import KtrayError
from ktray.jobs.definitions import JOBS
from ktray.models.student.classifier import Student, build_student
from ktray.models.student.classifier_io import save_student
from ktray.pipeline.plan import show_curate
from ktray.pipeline.run import curate_only
from ktray.pipeline.suggest import check, student_folder
from ktray.recipe.schema import Recipe
from ktray.stages.adapt.stage import frozen_predictions, train_embeddings
from ktray.stages.base import StageResult
from ktray.stages.index.gallery import Gallery
from ktray.stages.manifests import MANIFESTS, StageManifest
from ktray.storage.store import Store
from ktray.tasks.students import load_student

ASKED = 8


@dataclass(frozen=True)
class World:
    root: Path
    planted: dict[str, str]  # by what it is, the gallery image that must not be suggested
    twins: tuple[str, str]  # two gallery images that show the same
    student: Path

    def recipe(self, *more: str) -> Recipe:
        data = [
            f"task.data={self.root / 'task'}",
            f"gallery.data={self.root / 'gallery'}",
            f"store={self.root / 'store'}",
        ]
        return recipes.load(None, [*SMALL, *data, f"curate.suggest={ASKED}", *more])

    def file(self, result: dict[str, Any], name: str) -> Path:
        return self.root / "store" / "runs" / result["run_id"] / name

    def rows(self, result: dict[str, Any]) -> list[dict[str, str]]:
        with open(self.file(result, "suggestions.csv"), newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    def stage(self, result: dict[str, Any], name: str) -> StageResult:
        (key,) = [stage["key"] for stage in result["stages"] if stage["name"] == name]
        stage = Store(str(self.root / "store")).stage(name, key)
        return StageResult(stage, stage.manifest() or {}, True)

    def teacher(self, result: dict[str, Any]) -> tuple[dict[str, list[float]], list[list[float]]]:
        """The teacher's class probabilities of the gallery, by uri, and of the labelled images."""
        predict, gallery = frozen_predictions(self.stage(result, "adapt")), Gallery.of(self.stage(result, "index"))
        uris = [str(uri) for part in gallery.columns("uri") for uri in part]
        found = predict(gallery.embeddings(np.arange(gallery.total)))
        labelled = predict(train_embeddings(self.stage(result, "adapt"))[0])
        return dict(zip(uris, found.tolist(), strict=True)), labelled.tolist()


@pytest.fixture(scope="module")
def world(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("suggestions")
    task, gallery = write_task(root / "task"), root / "gallery"
    gallery.mkdir()
    rng = np.random.default_rng(5)
    for i in range(60):
        picture(i % 3, rng).save(gallery / f"{i % 3}-{i:02d}.png")
    planted = {}
    for split in ("train", "val", "test"):  # a copy in another format, and one of the file
        source = task / split / CLASSES[0] / f"{split} 0.png"
        Image.open(source).save(gallery / f"0-{split}.jpg", quality=95)
        shutil.copy(source, gallery / f"0-{split}-same.png")
        planted |= {f"{split} copy": str(gallery / f"0-{split}.jpg"), split: str(gallery / f"0-{split}-same.png")}
    odd = picture(1, rng)
    odd.save(gallery / "1-odd.png")
    odd.save(gallery / "1-odd.jpg", quality=95)
    torch.manual_seed(0)
    student = build_student("test_resnet", {}, 3, 32)
    save_student(student, root / "other" / "student", sorted(CLASSES))
    return World(root, planted, (str(gallery / "1-odd.png"), str(gallery / "1-odd.jpg")), root / "other")


@pytest.fixture(scope="module")
def first(world: World) -> dict[str, Any]:
    return curate_only(world.recipe())


def test_the_images_farthest_from_the_labels_are_listed_and_shown(world: World, first: dict[str, Any]) -> None:
    rows = world.rows(first)
    assert [int(row["rank"]) for row in rows] == list(range(1, ASKED + 1))
    probabilities, covered = world.teacher(first)
    classes = sorted(CLASSES)
    for row in rows:
        own = probabilities[row["uri"]]
        assert row["label"] == row["disagreement"] == ""
        assert (classes[int(np.argmax(own))], float(row["probability"])) == (
            row["suggested"],
            pytest.approx(max(own), abs=1e-3),
        )
        assert float(row["distance"]) == pytest.approx(min(math.dist(own, other) for other in covered), abs=1e-3)
        covered.append(own)
    distances = [float(row["distance"]) for row in rows]
    assert distances == sorted(distances, reverse=True)
    page = world.file(first, "suggestions.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == ASKED
    assert all(Path(row["uri"]).name in page for row in rows)
    facts = check_result("curate", world.file(first, "result.json"))["suggestions"]
    assert (facts["asked"], facts["suggested"], facts["student"]) == (ASKED, ASKED, None)
    assert facts["images"] == 68
    assert facts["copies"] >= len(world.planted)
    assert facts["candidates"] + facts["copies"] == facts["images"]
    (stage,) = (world.root / "store/stages/suggest").glob("*/manifest.json")
    named = MANIFESTS["suggest"].__required_keys__ | StageManifest.__required_keys__  # type: ignore[attr-defined]
    assert named == json.loads(stage.read_text()).keys()


def test_no_copy_of_a_labelled_image_and_no_image_twice(world: World) -> None:
    result = curate_only(world.recipe("curate.suggest=100"))
    uris = {row["uri"] for row in world.rows(result)}
    assert len(uris) == result["suggestions"]["suggested"] > 30
    assert not {name for name, uri in world.planted.items() if uri in uris}
    assert len(uris & set(world.twins)) == 1
    assert result["suggestions"]["repeated"] >= 1
    assert result["suggestions"]["suggested"] + result["suggestions"]["repeated"] == result["suggestions"]["candidates"]


def test_the_same_command_takes_the_labels_in_and_suggests_others(world: World, first: dict[str, Any]) -> None:
    folder = world.root / "answers"
    folder.mkdir()
    before = curate_only(world.recipe(f"task.more_labels={folder}"))  # nothing has come back yet
    cached = {stage["name"]: stage["cached"] for stage in before["stages"]}
    assert cached["suggest"]
    assert world.rows(before) == world.rows(first)
    rows = world.rows(before)
    for row in rows:
        row["label"] = CLASSES[int(Path(row["uri"]).name[0])]
    with open(folder / "round 1.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines: list[str] = []
    after = heard(lines, curate_only, world.recipe(f"task.more_labels={folder}"))
    assert any(f"task.more_labels adds {ASKED} training images" in line for line in lines)
    cached = {stage["name"]: stage["cached"] for stage in after["stages"]}
    assert cached["index"]
    assert not cached["adapt"]
    assert not cached["suggest"]
    _, uris, labels = train_embeddings(world.stage(after, "adapt"))
    taught = dict(zip(uris, labels.tolist(), strict=True))
    assert len(taught) == 15 + ASKED
    assert {row["uri"]: sorted(CLASSES).index(row["label"]) for row in rows}.items() <= taught.items()
    again = {row["uri"] for row in world.rows(after)}
    assert len(again) == ASKED
    assert not again & {row["uri"] for row in rows}
    assert not again & set(world.planted.values())
    assert after["suggestions"]["copies"] >= first["suggestions"]["copies"] + ASKED


def test_a_student_that_disagrees_moves_images_up(world: World, first: dict[str, Any]) -> None:
    result = curate_only(world.recipe(f"curate.student={world.student}"))
    assert result["suggestions"]["student"] == str(world.student / "student")
    rows, (probabilities, covered) = world.rows(result), world.teacher(result)
    student = load_student(world.student / "student")
    scores = []
    for row in rows:
        own, other = probabilities[row["uri"]], said(student, row["uri"])
        differs = jensenshannon(own, other, base=2) ** 2
        assert float(row["disagreement"]) == pytest.approx(differs, abs=2e-3)
        distance = min(math.dist(own, known) for known in covered)
        assert float(row["distance"]) == pytest.approx(distance, abs=1e-3)
        scores.append(distance * (1 + differs))
        covered.append(own)
    assert scores == sorted(scores, reverse=True)
    assert len({row["disagreement"] for row in rows}) > 1
    assert [row["uri"] for row in rows] != [row["uri"] for row in world.rows(first)]
    assert "disagreement" in world.file(result, "suggestions.html").read_text("utf-8")


def said(student: Student, uri: str) -> list[float]:
    (prediction,) = student.predict([uri])
    return [prediction.probabilities[name] for name in student.classes]


def test_without_a_gallery_the_images_beyond_the_budget_are_ranked(world: World) -> None:
    task = read_labelled(str(world.root / "task"), seed=0, labels_per_class=2)
    data = [f"task.data={world.root / 'task'}", "task.labels_per_class=2", f"store={world.root / 'store'}"]
    recipe = recipes.load(None, [*SMALL, *data, "transfer.source=target", "transfer.size=null", "curate.suggest=4"])
    result = curate_only(recipe)
    uris = [row["uri"] for row in world.rows(result)]
    assert len(uris) == len(set(uris)) == 4
    assert set(uris) <= set(task.unlabeled)
    assert result["suggestions"]["images"] == len(task.unlabeled) == 9


def test_python_reads_the_list(world: World, first: dict[str, Any]) -> None:
    table = CurateRun(first["folder"]).suggestions
    assert table is not None
    assert table["uri"].to_pylist() == [row["uri"] for row in world.rows(first)]
    assert set(table["label"].to_pylist()) <= {"", None}
    assert table["distance"].to_pylist() == [float(row["distance"]) for row in world.rows(first)]


def test_without_suggestions_nothing_is_written(world: World) -> None:
    result = curate_only(world.recipe("curate.suggest=0"))
    assert CurateRun(result["folder"]).suggestions is None
    assert "suggestions" not in result
    assert not world.file(result, "suggestions.csv").exists()


def test_the_plan_has_the_stage_and_the_command_says_what_follows(
    world: World, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    heard(lines, show_curate, world.recipe())
    planned = [line.split()[0] for line in lines if "reused" in line.split()[1:2] or "to run" in line]
    assert planned[-1] == "suggest"
    assert planned.index("curate") == len(planned) - 2
    assert any(line.startswith("suggest") and "reused" in line and "8 of 68 images to label" in line for line in lines)
    without: list[str] = []
    heard(without, show_curate, world.recipe("curate.suggest=0"))
    assert not any(line.startswith("suggest") for line in without)
    monkeypatch.setattr("ktray.pipeline.run.curate_only", lambda recipe, debug: first)
    ending: list[str] = []
    heard(ending, JOBS["curate"].run, world.recipe(), False)
    assert any(f"task.more_labels={first['suggestions']['path']}" in line for line in ending)


def keys(*more: str) -> Recipe:
    return recipes.load(None, ["curate.suggest=5", "transfer.source=retrieved", *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["task.kind=multilabel"], "task.kind=multilabel does not have"),
        (["task.kind=segmentation"], "task.kind=segmentation does not have"),
        (["transfer.source=generic"], "transfer.source=generic does not compute"),
        (["objective.name=dino", "transfer.source=target"], "this recipe has no teacher .*objective.name=dino"),
        (["curate.student=nowhere"], "curate.student=nowhere names no student"),
    ],
)
def test_what_cannot_be_suggested_is_refused_before_anything_runs(
    more: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(KtrayError, match=message):
        check(keys(f"store={tmp_path}", *more), CLASSES)
    assert check(keys(f"store={tmp_path}", *more, "curate.suggest=0"), CLASSES) is None


def test_a_student_is_found_by_run_by_folder_and_by_result(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    save_student(build_student("test_resnet", {}, 2, 32), run / "student", ["a", "b"])
    (run / "result.json").write_text(json.dumps({}))
    named = ["one", str(run), str(run / "student"), str(run / "result.json")]
    assert [student_folder(str(tmp_path), name).uri for name in named] == [str(run / "student")] * 4
    found = check(keys(f"store={tmp_path}", "curate.student=one"), ["a", "b"])
    assert found is not None
    assert found.directory.uri == str(run / "student")
    with pytest.raises(KtrayError, match=r"other classes \('a', 'b'\) than the task \('a', 'c'\)"):
        check(keys(f"store={tmp_path}", "curate.student=one"), ["a", "c"])


def test_another_student_is_another_key(tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        folder = tmp_path / str(len(found))
        save_student(build_student("test_resnet", {}, 2, 32), folder, ["a", "b"])
        student = check(keys(f"curate.student={folder}", f"store={tmp_path}"), ["a", "b"])
        assert student is not None
        found.append(student.identity())
    assert found[0] == found[1] != found[2]
