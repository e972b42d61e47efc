"""The export of a segmentation student: its files, its scores, and masks without ktray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ktray import recipe as recipes
from ktray.jobs.export import latency, predict, registry
from ktray.jobs.export import run as module
from ktray.jobs.export.predict import Classifier
from ktray.models.student.segmenter import Segmenter, build_segmenter
from ktray.models.student.segmenter_io import save_segmenter

CLASSES = ["background", "left", "right"]


def write_scenes(folder: Path, split: str, count: int, seed: int) -> None:
    """Pictures with one bright rectangle on a dark ground, in the left or the right half, and their masks."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / split / part).mkdir(parents=True)
    for i in range(count):
        height, width = int(rng.integers(50, 90)), int(rng.integers(60, 110))
        image = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        x = width // 8 if i % 2 == 0 else 5 * width // 8
        image[10:40, x : x + width // 4] += 180
        mask[10:40, x : x + width // 4] = 1 + i % 2
        mask[:3] = 255
        Image.fromarray(image).save(folder / split / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / split / "masks" / f"{i}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    for seed, (split, count) in enumerate({"train": 4, "val": 6, "test": 8}.items()):
        write_scenes(folder, split, count, seed)
    (folder / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    student = build_segmenter("test_resnet", {}, 3, 64).eval()
    student.classes = CLASSES
    # Weights are random; this makes the classes differ from pixel to pixel.
    for parameter in student.model.head.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    return student


@pytest.fixture
def run(scenes: Path, segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = [{"batch": batch, "threads": 1, "median_ms": 1.0, "p90_ms": 2.0, "runs": 10} for batch in (1, 4)]
    measured = {"rows": rows, "memory_bytes": 10**6}
    monkeypatch.setattr(latency, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(module, "busy_cores", lambda: 0.25)
    monkeypatch.setattr(registry, "log", lambda *_: None)
    folder = tmp_path / "store" / "runs" / "20260101-000000-scenes-oriented-0000"
    save_segmenter(segmenter, folder / "student", CLASSES)
    keys = {
        "store": str(tmp_path / "store"),
        "task.data": str(scenes),
        "task.kind": "segmentation",
        "task.metric": "miou",
        "teacher.name": "miniverse",
        "student.name": "test_resnet",
    }
    recipe = recipes.override(recipes.Recipe(), keys)
    (folder / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    cost = {"flops": {"total": 1.0}, "device_seconds": {"total": 1.0}, "usd": 0.0, "kwh": None}
    result = {
        "schema": 1,
        "run_id": folder.name,
        "objective": "scratch",
        "seed": 0,
        "label_budget": 4,
        "metric": {"name": "miou"},
        "stages": [],
        "cost": {**cost, "without_cache": {"flops": 1.0, "usd": 0.0}},
        "device": {"cpu": "a processor", "cores": 2, "gpus": []},
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def miou(predicted: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """From all pixels at once."""
    p, m = (np.concatenate([one.ravel() for one in values]) for values in (predicted, masks))
    p, m = p[m != 255], m[m != 255]
    present = [c for c in range(3) if ((p == c) | (m == c)).any()]
    return float(np.mean([((p == c) & (m == c)).sum() / ((p == c) | (m == c)).sum() for c in present]))


def test_files_scores_and_masks(run: Path, scenes: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    keys = [f"store={run.parents[1]}", "export.batch=4", "export.targets=[torch_export,onnx_pixels]"]
    found = module.export(recipes.load(None, [*keys, "export.graph=probabilities", "export.int8=true"]))
    folder = run / "export"
    assert {"student.onnx", "student.pt2", "student.pixels.onnx", "student.int8.onnx", "head.safetensors"} <= set(
        found["files"]
    )
    images = sorted((scenes / "test" / "images").glob("*"))
    masks = [np.asarray(Image.open(scenes / "test" / "masks" / path.name)) for path in images]
    expected = segmenter.predict(images)
    assert len(np.unique(np.concatenate([one.mask.ravel() for one in expected]))) > 1
    scores = found["metric"]["test"]
    assert scores["pytorch"]["metric"] == pytest.approx(miou([one.mask for one in expected], masks))
    for name in ("onnx", "torch_export", "onnx_pixels"):
        assert found[name]["agreement"]["test"]["images"] == 8
        assert scores[name]["metric"] == pytest.approx(scores["pytorch"]["metric"], abs=1e-3)
    assert 0 <= scores["int8"]["metric"] <= 1
    assert found["calibration"] is None

    shipped = Classifier(folder / "student.onnx")
    for path, one in zip(images, expected, strict=True):
        (answer,) = shipped.predict([path.read_bytes()])
        assert np.mean(answer["mask"] != one.mask) < 0.001
        assert answer["shares"] == pytest.approx(one.shares(), abs=0.001)
    with pytest.raises(ValueError, match="segmentation model has no class probabilities"):
        shipped.probabilities([images[0].read_bytes()])

    command = [sys.executable, str(folder / "predict.py"), str(images[0]), "--masks", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {"image", "shares"}
    written = np.asarray(Image.open(tmp_path / "out" / "0.png.png"))
    assert written.shape == masks[0].shape
    assert np.mean(written != expected[0].mask) < 0.001

    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-segmentation" in text
    assert "gives the same class for every pixel as PyTorch" in text
    assert "probabilities differ by at most" in text


def test_the_model_in_mlflow_returns_masks(run: Path, scenes: Path, tmp_path: Path) -> None:
    import mlflow
    import pandas as pd

    module.export(recipes.load(None, [f"store={run.parents[1]}", "export.batch=4"]))
    registry.save(run / "export", tmp_path / "model", "float")
    data = (scenes / "test" / "images" / "0.png").read_bytes()
    answer = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(pd.DataFrame({"image": [data]}))
    (expected,) = Classifier(run / "export" / "student.onnx").predict([data])
    assert answer["mask"][0] == predict.png(expected["mask"])
    assert answer["shares"][0] == pytest.approx(expected["shares"])


@pytest.mark.parametrize("size", [(16, 16), (23, 41), (100, 7), (8, 8), (3, 5)])
def test_resized_maps_are_those_of_pytorch(size: tuple[int, int]) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 8, 8)).astype(np.float32)
    whole = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size, mode="bilinear")[0]
    assert np.mean(predict.mask_of(logits, size) != whole.argmax(0).numpy()) < 0.002
