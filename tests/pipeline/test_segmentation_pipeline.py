"""Segmentation through the whole job on a small world: bad masks, maps as targets, mIoU, two workers, a comparison."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from small_task import SMALL, write_scenes

import ktray
from ktray import recipe as recipes
from ktray.jobs.compare.methods import Method
from ktray.jobs.compare.rows import build as compared
from ktray.pipeline.run import run
from ktray.storage.store import Store

KEYS = [
    "task.kind=segmentation",
    "teacher.levels=4",
    "student.kwargs={output_stride: 8}",
    "baselines.scratch=false",
    "data.max_bad_fraction=0.2",
]


def distil(world, store, *overrides):
    data = [f"store={store}", f"task.data={world / 'task'}", f"gallery.data={world / 'gallery'}"]
    return run(recipes.load(None, [*SMALL, *data, *KEYS, *overrides]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root / "task", root / "gallery")
    train = root / "task/train"
    (train / "masks/0.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(train / "masks/1.png")
    return root


@pytest.fixture(scope="module")
def done(cluster, world, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return store, distil(world, store, "train.steps=120", "train.lr=0.01")


def test_it_learns_and_is_judged_by_miou(done):
    _, result = done
    assert result["metric"]["name"] == "miou"
    assert 0.4 < result["metric"]["test"] < 1  # all background: about a quarter
    assert set(result["metric"]["per_class"]) == {"ground", "square", "disc"}
    assert result["teacher_metric"]["test"] > 0.3


def test_images_with_bad_masks_are_quarantined(done):
    import pyarrow.parquet as pq

    store, result = done
    listed = pq.read_table(store / "runs" / result["run_id"] / "quarantine.parquet").to_pylist()
    assert {row["uri"].rpartition("/")[2] for row in listed} == {"0.png", "1.png"}
    assert all("mask" in row["reason"] for row in listed)


def test_the_miou_is_scikit_learns_on_the_saved_students_masks(done, world):
    store, result = done
    student = ktray.load_student(store / "runs" / result["run_id"] / "student")
    images = sorted((world / "task/test/images").iterdir())
    found = np.stack([p.mask for p in student.predict(images)])
    true = np.stack([np.asarray(Image.open(world / "task/test/masks" / path.name)) for path in images])
    seen = true != 255
    expected = jaccard_score(true[seen], found[seen], average="macro")
    assert result["metric"]["test"] == pytest.approx(float(expected), abs=2e-3)


def test_the_backbone_is_plain_timm(done):
    store, result = done
    folder = store / "runs" / result["run_id"] / "student"
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = ktray.load_student(folder)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), ours.features(x))


def test_the_report_shows_masks(done):
    store, result = done
    page = (store / "runs" / result["run_id"] / "report.html").read_text()
    assert page.count("data:image/") >= 2
    assert "mean IoU" in page
    assert "The test images with the lowest IoU" in page


@pytest.mark.long
def test_two_workers_learn_from_the_same_maps(done, world, tmp_path):
    store, one = done
    for name in ("labels", "adapt", "index", "curate", "teach"):
        shutil.copytree(store / "stages" / name, tmp_path / "stages" / name)
    shutil.copytree(store / "galleries", tmp_path / "galleries")
    two = distil(world, tmp_path, "train.steps=120", "train.lr=0.01", "cluster.workers=2")
    assert two["cluster"]["workers"] == 2
    assert all(s["cached"] for s in two["stages"] if s["name"] in ("labels", "adapt", "index", "curate", "teach"))
    assert abs(two["metric"]["test"] - one["metric"]["test"]) < 0.25  # 12 images, another order of batches


def test_patches_of_the_teacher_pretrain_a_segmenter_too_and_ways_are_compared(done, world):
    store, oriented = done
    agnostic = distil(world, store, "train.steps=20", "objective.name=agnostic", "objective.patches=1")
    ways = {name: Method({"objective.name": name}, name) for name in ("oriented", "agnostic")}
    rows = compared(Store(str(store)), ways, {"oriented": [oriented], "agnostic": [agnostic]})
    for row, result in zip(rows, (oriented, agnostic), strict=True):
        assert row["accuracy"] == pytest.approx(result["metric"]["test"])
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert json.dumps(rows)
