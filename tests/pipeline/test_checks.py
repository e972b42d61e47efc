"""What is checked and told before anything is paid."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from ktray import recipe as recipes
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.errors import KtrayError
from ktray.models.student.exportable import export_problem
from ktray.pipeline import checks
from ktray.pipeline.checks import exportable, require_files, require_test_split, task_counts, warnings
from ktray.tasks.base import task_kind

DEVICE = {"cores": 2, "gpus": [{"name": "NVIDIA L4"}], "instance": "g6.xlarge"}


def recipe(*keys: str) -> recipes.Recipe:
    return recipes.load(None, ["task.data=/z", *keys])


@pytest.mark.parametrize("key", ["teacher.checkpoint", "teacher.config", "student.checkpoint"])
def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path: Path, key: str) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    require_files(recipe("teacher.name=x", f"{key}={tmp_path}/weights.pt"))
    with pytest.raises(KtrayError, match=rf"There is no file .*\({key}\)\. Did you mean '.*/weights\.pt'\?"):
        require_files(recipe("teacher.name=x", f"{key}={tmp_path}/weigths.pt"))
    with pytest.raises(KtrayError, match="Folder '/' has no 'nowhere'"):
        require_files(recipe("teacher.name=x", f"{key}=/nowhere/at/all.pt"))


def test_files_of_further_teachers(tmp_path: Path) -> None:
    with pytest.raises(KtrayError, match=r"teacher\.others\.checkpoint"):
        require_files(recipe("teacher.name=x", "teacher.others=[{name: y, checkpoint: /nowhere.pt}]"))


def test_prices_that_name_nothing() -> None:
    assert warnings(recipe("prices.g6.xlarge=0.9", "prices.L4=0.5", "prices.cpu_core=0.1"), DEVICE) == []
    (told,) = warnings(recipe("prices.FOO=0.9"), DEVICE)
    assert "prices.FOO names no device" in told
    (told,) = warnings(recipe("prices.H10=0.9"), DEVICE)
    assert "Did you mean 'H100'?" in told


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 1e8))
    (told,) = warnings(recipe(f"store={tmp_path}/not/yet/there"), DEVICE)
    assert "0.1 GB left" in told
    assert warnings(recipe("store=s3://bucket/x"), DEVICE) == []


def test_the_counts_of_a_task() -> None:
    def images(*labels: int) -> list[LabelledExample]:
        return [LabelledExample(f"{i}.jpg", label) for i, label in enumerate(labels)]

    task = LabelledSet(["cat", "dog"], images(0, 0, 0, 1), images(0, 1), [])
    assert task_counts(task, True) == (
        "2 classes (cat, dog): 4 training, 2 validation, 0 test images; of each class 1 to 3 training, 1 validation"
    )
    assert task_counts(task, False) == "2 classes (cat, dog): 4 training, 2 validation, 0 test images"
    many = LabelledSet([f"c{i}" for i in range(100)], images(*range(100)), [], [])
    assert task_counts(many, True).startswith("100 classes (c0, c1, c2, c3, c4, c5, c6, c7, ...): 100 training")
    with pytest.raises(KtrayError, match="There is no test image, and it needs one"):
        require_test_split(task, "it needs one")


class _Branches(torch.nn.Module):
    """A network whose next layer depends on the values, which no trace can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3))
        return self.layer(pooled if pooled.sum() > 0 else -pooled)


def test_a_student_that_cannot_be_exported_is_told_before_it_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = recipe("student.name=test_resnet", "image_size=32", f"store={tmp_path}")
    assert exportable(asked, 3) == []
    kind = task_kind("classification")
    built = kind.build_student("test_resnet", {}, 3, 32)
    monkeypatch.setattr(built, "model", _Branches())
    monkeypatch.setattr(type(kind), "build_student", lambda *_, **__: built)
    (told,) = exportable(asked, 4)
    assert "student 'test_resnet' cannot be exported by jobs/export.py" in told
    assert "data-dependent" in told

    # The next job with the store knows that the first one can be exported, without tracing. A problem is looked at
    # again; a damaged answer, and no place for it, do no harm.
    monkeypatch.setattr(checks, "_export_problem", lambda model: "traced anew")
    assert exportable(asked, 3) == []
    assert "traced anew" in exportable(asked, 4)[0]
    (file,) = (tmp_path / "exportable").iterdir()
    file.write_text("{")
    assert "traced anew" in exportable(asked, 3)[0]
    (tmp_path / "file").write_text("")
    nowhere = recipe("student.name=test_resnet", "image_size=32", f"store={tmp_path}/file")
    assert "traced anew" in exportable(nowhere, 3)[0]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit", "test_efficientnet"])
def test_what_can_be_traced_has_no_problem(name: str) -> None:
    """The reference is the exported program itself, run on another batch size."""
    model = timm.create_model(name, num_classes=3).eval()
    size = model.default_cfg["input_size"][1:]
    assert export_problem(model, size) == ""
    example = torch.randn(2, 3, *size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(5, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(program(more), model(more))
