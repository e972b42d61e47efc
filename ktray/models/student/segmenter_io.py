"""Segmentation students on disk: the backbone as plain timm loads it, and beside it the head.

``timm.create_model("local-dir:DIR", pretrained=True)`` gives the backbone, without classifier.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.messages import cause
from ktray.models.student.classifier import Student
from ktray.models.student.classifier_io import _unwrap, save_student
from ktray.models.student.classifier_io import load_student as load_classifier
from ktray.models.student.segmenter import DenseNet, DenseStudent
from ktray.models.teacher.adapted import _fill, _plain

_FILE, _FORMAT = "segmentation.json", 1


def save_dense_student(
    student: DenseStudent,
    directory: str | Path,
    classes: Sequence[str],
    preprocess: Preprocess | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json`` (the backbone), ``head.safetensors`` and ``segmentation.json``.

    Args:
        student: what to save; its `model` may be wrapped.
        directory: created if needed.
        classes: names in the order of the logits.
        preprocess: the student's own if None.

    Raises:
        KtrayError: as many names as logits are needed, and arguments that JSON can hold.
    """
    model = _unwrap(student.model)
    assert isinstance(model, DenseNet)
    if model.num_classes != len(classes):
        raise KtrayError(f"The student has {model.num_classes} logits for {len(classes)} classes", "Name each.")
    p = preprocess or student.preprocess
    save_student(Student(model.backbone, student.name, student.kwargs, p, []), directory, [])
    folder = Path(directory)
    save_file(_plain(model.head), str(folder / "head.safetensors"))
    facts = {
        "format": _FORMAT,
        "head": model.kind,
        "width": model.width,
        "classes": list(classes),
        "preprocess": p.to_dict(),
    }
    (folder / _FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def load_dense_student(directory: str | Path, device: str | torch.device = "cpu") -> DenseStudent:
    """A segmentation student in evaluation mode, as `save_dense_student` left it.

    Raises:
        KtrayError: the folder is not one, or its weights are damaged or do not fit.
    """
    folder = Path(directory)
    try:
        facts = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        classes, kind, width = facts["classes"], facts["head"], facts["width"]
        preprocess = Preprocess.from_dict(facts["preprocess"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KtrayError(
            f"'{folder}' holds no segmentation student: {cause(error)}", "Give a run's student/ folder."
        ) from error
    plain = load_classifier(folder)
    model = DenseNet(plain.model, kind, len(classes), preprocess.size, width)
    _fill(model.head, folder / "head.safetensors")
    return DenseStudent(model, plain.name, plain.kwargs, preprocess, classes).eval().to(device)


def is_dense_student(directory: str | Path) -> bool:
    """Whether `save_dense_student` wrote this folder."""
    return (Path(directory) / _FILE).is_file()


def load_student(directory: str | Path, device: str | torch.device = "cpu") -> Student | DenseStudent:
    """The student of a run folder, in evaluation mode: a classifier, or a segmenter.

    Args:
        directory: a run's ``student/`` folder.
        device: where to put it.

    Raises:
        KtrayError: the folder is not one, or its weights are damaged or do not fit.
    """
    if is_dense_student(directory):
        return load_dense_student(directory, device)
    return load_classifier(directory, device)
