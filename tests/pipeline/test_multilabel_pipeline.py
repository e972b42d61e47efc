"""Multi-label classification through the whole job on a small world, and its export."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from small_task import SMALL

import ktray
from ktray import recipe as recipes
from ktray.jobs.compare.methods import Method, unavailable
from ktray.jobs.compare.rows import build as compared
from ktray.jobs.export.run import export
from ktray.jobs.tune.default_space import default_space
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import run
from ktray.storage.columns import read_rows
from ktray.storage.store import Stage, Store

CLASSES = ["dark", "light", "striped"]
KEYS = [
    "task.kind=multilabel",
    "teacher.adapt=auto",
    "teacher.candidates=[text,probe]",
    "baselines.scratch=true",
    "train.steps=120",
    "train.lr=0.01",
    "data.max_bad_fraction=0.2",
]


def picture(rng: np.random.Generator, shown: np.ndarray) -> Image.Image:
    """Grey noise with a dark disc, a light square, and stripes, each in a corner of its own."""
    y, x = np.mgrid[:40, :40]
    image = rng.normal(110, 10, (40, 40, 3))
    corners = rng.permutation(4)
    for kind in np.flatnonzero(shown).tolist():
        top, left = (2 + 20 * int(v) for v in divmod(int(corners[kind]), 2))
        inside = (y >= top) & (y < top + 15) & (x >= left) & (x < left + 15)
        if kind == 0:
            image[inside & ((y - top - 7) ** 2 + (x - left - 7) ** 2 < 49)] -= 90
        elif kind == 1:
            image[inside] += 90
        else:
            image[inside] += np.where((y // 3 % 2)[inside], 60, -60)[:, None]
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name in ("images", "gallery"):
        (root / name).mkdir()
    rows = []
    for i in range(120):
        shown = rng.random(3) < (0.3, 0.5, 0.4)
        picture(rng, shown).save(root / f"images/{i}.png")
        split = "train" if i < 60 else "val" if i < 84 else "test"
        rows.append([f"images/{i}.png", ";".join(np.array(CLASSES)[shown]), split])
    for i in range(100):
        picture(rng, rng.random(3) < 0.4).save(root / f"gallery/{i}.jpg", quality=92)
    (root / "images/1.png").write_bytes(b"no picture")
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    return root


def keys(world: Path, store: Path, *more: str) -> list[str]:
    data = [f"store={store}", f"task.data={world / 'labels.csv'}", f"gallery.data={world / 'gallery'}"]
    return [*SMALL, *data, *KEYS, *more]


@pytest.fixture(scope="module")
def done(cluster: Any, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    store = tmp_path_factory.mktemp("store")
    return store, run(recipes.load(None, keys(world, store)))


@pytest.fixture(scope="module")
def tested(world: Path) -> tuple[list[str], np.ndarray]:
    with (world / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    labels = [[int(name in row["label"].split(";")) for name in CLASSES] for row in rows]
    return [str(world / row["path"]) for row in rows], np.array(labels)


def test_it_learns_and_the_saved_student_has_the_metrics_of_the_result(
    done: tuple[Path, dict[str, Any]], tested: tuple[list[str], np.ndarray]
) -> None:
    store, result = done
    metric, (paths, labels) = result["metric"], tested
    assert (metric["name"], metric["words"]) == ("map", "mean average precision")
    student = ktray.load_student(store / "runs" / result["run_id"] / "student")
    found = student.predict(paths)
    probability = np.array([[tags.probabilities[name] for name in CLASSES] for tags in found])
    assert metric["test"] == pytest.approx(average_precision_score(labels, probability, average="macro"), abs=1e-4)
    assert metric["test"] > labels.mean() + 0.2  # a student that knows nothing has the mean
    decided = np.array([[int(name in tags.labels) for name in CLASSES] for tags in found])
    assert metric["micro_f1"] == pytest.approx(f1_score(labels, decided, average="micro"))
    assert metric["macro_f1"] == pytest.approx(f1_score(labels, decided, average="macro"))
    assert metric["decisions"]["thresholds"] == dict(zip(CLASSES, student.thresholds, strict=True))
    assert set(metric["per_class"]) == set(metric["details"]) == set(CLASSES)
    assert result["teacher_metric"]["test"] > labels.mean() + 0.2
    assert result["teacher_metric"]["adapt"] in ("text", "probe")
    assert 0 < result["scratch_metric"]["test"] <= 1


def test_the_report_has_classes_and_the_worst_images(done: tuple[Path, dict[str, Any]]) -> None:
    store, result = done
    page = (store / "runs" / result["run_id"] / "report.html").read_text()
    assert 'id="classes"' in page
    assert "threshold" in page
    assert "mean average precision" in page.lower()
    assert "lowest Jaccard index" in page


def test_a_bad_image_is_quarantined_and_queries_have_shares(done: tuple[Path, dict[str, Any]]) -> None:
    store, result = done
    assert result["data"]["quarantined"] == 1
    key = next(stage["key"] for stage in result["stages"] if stage["name"] == "adapt")
    stage = Stage(Store(str(store)).stage("adapt", key).uri)
    assert read_rows(stage, "embedding-train.parquet")["classes"].shape == (59, 3)
    key = next(stage["key"] for stage in result["stages"] if stage["name"] == "curate")
    manifest = Store(str(store)).stage("curate", key).read_json("manifest.json")
    assert set(manifest["coverage"]["classes"]) == set(CLASSES)
    assert all(found["images"] > 0 for found in manifest["coverage"]["classes"].values())


def test_a_comparison_scores_its_images(done: tuple[Path, dict[str, Any]]) -> None:
    store, result = done
    (row,) = compared(Store(str(store)), {"a": Method({}, "a")}, {"a": [result]})
    assert row["accuracy"] == result["metric"]["test"]
    around = row["low"], row["accuracy"], row["high"]
    assert around == (1, 1, 1) or around[0] < around[1] < around[2]  # a student without an error has no spread


def test_objectives_and_searches_without_classes_of_images(world: Path, tmp_path: Path, cluster: Any) -> None:
    recipe = recipes.load(None, keys(world, tmp_path))
    assert {"dual", "mtkd"} <= set(unavailable(recipe))
    assert not {"oriented", "agnostic", "scratch"} & set(unavailable(recipe))
    space = default_space(resolve(recipe, cluster).recipe, True, False)
    assert "dual" not in space["objective.name"]
    assert set(space["transfer.strategy"]["choices"]) == {"best_first", "diverse", "query_balanced"}
    assert space["transfer.per"]["choices"] == ["query", "class"]


def test_the_export_prints_the_classes_above_their_thresholds(
    done: tuple[Path, dict[str, Any]], tested: tuple[list[str], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, result = done
    content = export(recipes.load(None, [f"store={store}", f"export.run={result['run_id']}"]))
    assert content["onnx"]["agreement"]["test"]["images"] == 36
    assert content["metric"]["test"]["onnx"]["metric"] == pytest.approx(result["metric"]["test"], abs=1e-4)
    assert content["metric"]["test"]["onnx"]["micro_f1"] == pytest.approx(result["metric"]["micro_f1"], abs=0.03)
    folder, paths = Path(content["folder"]), tested[0][:6]
    printed = subprocess.run(
        [sys.executable, folder / "predict.py", *paths], capture_output=True, text=True, check=True
    ).stdout
    student = ktray.load_student(folder)
    for line, tags in zip(printed.splitlines(), student.predict(paths), strict=True):
        row = json.loads(line)
        assert row["labels"] == tags.labels
        assert row["probabilities"] == pytest.approx(tags.probabilities, abs=1e-4)
    assert "mean average precision" in (folder / "README.md").read_text()
