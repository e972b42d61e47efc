"""A finished run as jobs/distill.py leaves it, whose student was really trained, in seconds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_task import CLASSES, write_task

from ktray import recipe as recipes
from ktray.models.student.classifier import Student, build_student
from ktray.models.student.classifier_io import save_student

SIDE = 32


def trained(data: Path, name: str = "test_resnet", **kwargs: Any) -> Student:
    """A student of the stripes, fitted to their train and validation images; poor students prove little."""
    torch.manual_seed(0)
    student = build_student(name, kwargs, 3, SIDE)
    student.classes = sorted(CLASSES)
    paths = sorted(p for p in data.glob("*/*/*") if p.parts[-3] in ("train", "val"))
    files = [(path, student.classes.index(path.parent.name)) for path in paths]
    pixels = np.stack([student.preprocess.eval_transform(Image.open(path)) for path, _ in files])
    x, y = student.preprocess.normalise(torch.from_numpy(pixels)), torch.tensor([label for _, label in files])
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    student.train()
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(student(x), y).backward()
        optimizer.step()
    return student.eval()


def leave(store: Path, data: Path, student: Student, run_id: str = "20260101-000000-stripes-oriented-0000") -> Path:
    """The run's folder; what its ``result.json`` says of accuracy is measured with `StudentConfig.predict`."""
    folder = store / "runs" / run_id
    save_student(student, folder / "student", student.classes)
    recipe = recipes.override(
        recipes.Recipe(),
        {
            "store": str(store),
            "task.data": str(data),
            "task.metric": "top1",
            "teacher.name": "miniverse",
            "student.name": student.name,
            "mlflow.uri": f"sqlite:///{store}/mlflow.db",
            "mlflow.experiment": "exp",
        },
    )
    (folder / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    cost = {"flops": {"total": 1.5e12}, "device_seconds": {"total": 90.0}, "usd": 0.004, "kwh": None}
    result = {
        "schema": 1,
        "run_id": run_id,
        "objective": "oriented",
        "teacher": "miniverse",
        "seed": 0,
        "label_budget": 15,
        "metric": {"name": "top1", **{split: accuracy(student, data / split) for split in ("val", "test")}},
        "teacher_metric": {"val": 0.9, "adapt": "probe", "test": 0.8},
        "transfer_set": {
            "source": "retrieved",
            "strategy": "query_balanced",
            "size": 100,
            "kept": 98,
            "dropped": {"near test": 2},
        },
        "stages": [],
        "cost": {**cost, "without_cache": {"flops": 2e12, "usd": 0.005}},
        "mlflow": {"tracking_uri": f"sqlite:///{store}/mlflow.db", "experiment": "exp", "run_id": None},
        "device": {"cpu": "a processor", "cores": 2, "gpus": []},
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def accuracy(student: Student, folder: Path) -> float:
    files = sorted(folder.glob("*/*"))
    found = student.predict([path.read_bytes() for path in files])
    return float(np.mean([p.label == path.parent.name for p, path in zip(found, files, strict=True)]))


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("stripes") / "data", test=20)


@pytest.fixture(scope="session")
def student(stripes: Path) -> Student:
    return trained(stripes, output_stride=8)


@pytest.fixture(scope="session")
def onnx_file(student: Student, tmp_path_factory) -> Path:
    """The student as ONNX, to be read only."""
    from ktray.jobs.export import onnx_file as module

    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    module.write(student, path)
    return path


@pytest.fixture
def run(stripes: Path, student: Student, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder of the test's own, in a store with an MLflow database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = leave(tmp_path / "store", stripes, student)
    shutil.copy(database, tmp_path / "store" / "mlflow.db")
    return folder
