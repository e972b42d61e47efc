"""HYGIENE in a whole run: planted copies and labels are counted, listed, shown and logged; nothing is moved."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from heard import heard
from PIL import Image
from results import check_result
from small_task import SMALL, write_scenes

from ktray import recipe as recipes
from ktray.pipeline.run import run
from ktray.stages import hygiene
from ktray.stages.base import StageResult
from ktray.storage.store import Stage


def photo(seed: int) -> Image.Image:
    """Soft coloured shapes; no two are alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 6, 3)).astype(np.uint8))
    return coarse.resize((54, 60), Image.Resampling.BICUBIC)


def write_photos(root: Path) -> Path:
    for s, (split, count) in enumerate((("train", 8), ("val", 4), ("test", 6))):
        for c, name in enumerate(("cat", "<b>dog</b>".replace("/", "∕"))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photo(100 * s + 10 * c + i).save(folder / f"{i}.png")
    cats, dogs = sorted(path.name for path in (root / "train").iterdir())[::-1]
    assert cats == "cat"
    # A test image is a training image, saved again; a validation image is one of another class, mirrored.
    buffer = io.BytesIO()
    Image.open(root / "train" / cats / "3.png").save(buffer, "JPEG", quality=60)
    (root / "test" / cats / "copy.jpg").write_bytes(buffer.getvalue())
    Image.open(root / "train" / dogs / "2.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
        root / "val" / cats / "mirror.png"
    )
    # Two training images with the same bytes and two labels.
    shutil.copy(root / "train" / cats / "5.png", root / "train" / dogs / "5 again.png")
    (root / "test" / cats / "broken.png").write_bytes(b"no image")
    return root


def quick(store: Path, *keys: str) -> list[str]:
    return [f"store={store}", *SMALL, "objective.name=scratch", "train.steps=4", "data.max_bad_fraction=0.5", *keys]


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("hygiene")
    task = write_photos(root / "task")
    before = {path: path.read_bytes() for path in task.rglob("*") if path.is_file()}
    lines: list[str] = []
    result = heard(lines, run, recipes.load(None, quick(root / "store", f"task.data={task}")))
    assert {path: path.read_bytes() for path in task.rglob("*") if path.is_file()} == before
    return root, result, lines


def test_planted_copies_and_labels_are_counted_and_listed(finished) -> None:
    root, result, lines = finished
    check_result("distill", root / "store" / "runs" / result["run_id"] / "result.json")
    numbers = {name: value for name, value in result["hygiene"].items() if name != "path"}
    assert numbers == {
        "checked": 39,  # without the broken image
        "train_val": 1,
        "train_test": 1,
        "val_test": 0,
        "torn_groups": 0,
        "two_labels": 1,
        "doubtful_labels": 0,  # there is no teacher
    }
    folder = Path(result["hygiene"]["path"]).parent
    found = hygiene.findings(StageResult(Stage(str(folder)), {}, True))
    listed = {(f.kind, Path(f.uri).name, f.split, Path(f.other_uri).name, f.other_split) for f in found}
    assert listed == {
        ("near_copy", "3.png", "train", "copy.jpg", "test"),
        ("near_copy", "2.png", "train", "mirror.png", "val"),
        ("two_labels", "5 again.png", "train", "5.png", "train"),
    }
    text = "\n".join(lines)
    for said in ("test images that are copies of training images: 1", "identical images with two labels: 1"):
        assert f"hygiene   WARNING: {said}" in text
    assert result["metric"]["test_images"] == 13  # the copy stays: splits of the user are not changed


def test_the_report_shows_the_images_and_escapes_names(finished) -> None:
    root, result, _ = finished
    html = (root / "store" / "runs" / result["run_id"] / "report.html").read_text("utf-8")
    section = html[html.index('<section id="labels">') : html.index('<section id="data">')]
    assert section.count("<img") == 6
    assert "&lt;b&gt;dog" in section
    assert "<b>dog" not in section


def test_another_run_reuses_the_check_by_its_key(finished) -> None:
    root, result, _ = finished
    again = run(recipes.load(None, quick(root / "store", f"task.data={root / 'task'}", "train.lr=0.001")))
    (row,) = [row for row in again["stages"] if row["name"] == "hygiene"]
    assert row["cached"]
    assert again["hygiene"] == result["hygiene"]


def test_tasks_find_what_the_driver_finds(finished, cluster, tmp_path, monkeypatch) -> None:
    root, result, _ = finished
    monkeypatch.setattr(hygiene, "FEW", 0)
    again = run(recipes.load(None, quick(tmp_path / "store", f"task.data={root / 'task'}")))

    def found(numbers: dict[str, object]) -> list[hygiene.Finding]:
        folder = Path(str(numbers["path"])).parent
        return hygiene.findings(StageResult(Stage(str(folder)), {}, True))

    assert found(again["hygiene"]) == found(result["hygiene"])
    assert {**again["hygiene"], "path": ""} == {**result["hygiene"], "path": ""}


def test_a_task_without_classes_has_copies_only(cluster, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hygiene, "FEW", 0)  # as for many images: a task compares them
    write_scenes(tmp_path / "task", tmp_path / "gallery")
    for what in ("images", "masks"):
        shutil.copy(tmp_path / "task/train" / what / "4.png", tmp_path / "task/test" / what / "copy.png")
    keys = quick(tmp_path / "store", f"task.data={tmp_path / 'task'}", "task.kind=segmentation")
    numbers = run(recipes.load(None, keys))["hygiene"]
    assert numbers["train_test"] == 1
    assert numbers["two_labels"] == numbers["doubtful_labels"] == 0
