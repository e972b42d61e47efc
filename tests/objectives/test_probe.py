"""The linear probe of a student: its trunk does not change, and its head is the best regularised one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from heard import heard
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from small_task import CLASSES, SMALL, write_task

from ktray import recipe as recipes
from ktray.models.student.classifier import build_student
from ktray.models.teacher.heads import L2_GRID
from ktray.pipeline.run import run
from ktray.storage.store import Dir
from ktray.tasks.base import task_kind
from ktray.training.inputs import Labels


def published(folder: Path) -> torch.nn.Module:
    """A task in ``folder``, and a student whose weights are in ``start.safetensors`` there."""
    write_task(folder / "task", train=8)
    torch.manual_seed(3)
    start = timm.create_model("test_resnet", num_classes=10, output_stride=16)
    save_file(start.state_dict(), str(folder / "start.safetensors"))
    return start


@pytest.mark.slow
def test_only_the_head_is_fitted(cluster: Any, tmp_path: Path) -> None:
    start = published(tmp_path)
    keys = [f"store={tmp_path / 'store'}", f"task.data={tmp_path / 'task'}", *SMALL, "objective.name=probe"]
    result = heard([], run, recipes.load(None, [*keys, f"student.checkpoint={tmp_path / 'start.safetensors'}"]))
    assert result["objective"] == "probe"
    assert result["delivered"]["name"] == "start"

    (stage,) = (tmp_path / "store/stages/scratch").iterdir()
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["steps"] == 0
    weights, before = load_file(str(stage / "weights.safetensors")), start.state_dict()
    head = {"fc.weight", "fc.bias"}
    assert set(weights) == set(before)
    assert all(torch.equal(weights[name], before[name]) for name in before if name not in head)
    assert weights["fc.weight"].shape[0] == len(CLASSES)

    # Independent reference: scikit-learn's logistic regression on timm's features of unit length, for each strength.
    student = build_student("test_resnet", {"output_stride": 16}, len(CLASSES), 32)
    student.model.load_state_dict(weights)
    (folder,) = (tmp_path / "store/stages/labels").iterdir()
    pixels, truth = Labels(Dir(str(folder)), task_kind("classification")).load("train", "pixels")
    model = student.model.eval()
    with torch.no_grad():
        maps = model.forward_features(student.preprocess.normalise(pixels))
        features = model.forward_head(maps, pre_logits=True).numpy()
    length = np.linalg.norm(features, axis=1, keepdims=True)
    found = weights["fc.weight"].numpy() * length.mean()
    apart = []
    for strength in L2_GRID:
        reference = LogisticRegression(C=1 / (strength * len(truth)), max_iter=20_000, tol=1e-8)
        reference.fit(features / length, truth.numpy())
        apart.append(np.abs(reference.coef_ - found).max() / np.abs(found).max())
    assert min(apart) < 0.01


@pytest.mark.long
def test_a_published_student_starts_with_this_head_unless_the_recipe_refuses(cluster: Any, tmp_path: Path) -> None:
    published(tmp_path)
    short = [
        "train.steps=2",
        "train.evals=1",
        "finetune.steps=0",
        f"student.checkpoint={tmp_path / 'start.safetensors'}",
    ]
    keys = [f"store={tmp_path / 'store'}", f"task.data={tmp_path / 'task'}", *SMALL, *short]

    def curves(*more: str) -> dict[str, float]:
        """The first validation loss of each training of a student, before any step."""
        result = heard([], run, recipes.load(None, [*keys, *more]))
        found = {}
        for row in result["stages"]:
            if row["name"] in ("transfer", "start", "finetune"):
                stage = "transfer" if row["name"] == "transfer" else "scratch"
                manifest = json.loads((tmp_path / "store/stages" / stage / row["key"] / "manifest.json").read_text())
                found[row["name"]] = manifest["curve"][0]["val_loss"]
        return found

    (probe,) = curves("objective.name=probe").values()
    fitted, random = curves(), curves("student.fit_head=false")
    assert set(fitted) == {"transfer", "start"}
    assert list(fitted.values()) == pytest.approx([probe, probe], rel=1e-4)
    assert min(abs(loss - probe) for loss in random.values()) > 1e-3
