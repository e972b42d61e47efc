"""Segmentation students on disk: the backbone in a format that timm loads, and the head in another file.

``timm.create_model("local-dir:DIR", pretrained=True)`` returns the backbone, without classifier.
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
from ktray.models.student.classifier_io import load_student, save_student, unwrap
from ktray.models.student.segmenter import Segmenter, SegmenterNet
from ktray.models.weights import fill, plain

FILE, _FORMAT = "segmentation.json", 1


def save_segmenter(
    student: Segmenter,
    directory: str | Path,
    classes: Sequence[str],
    preprocess: Preprocess | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json`` (the backbone), ``head.safetensors`` and ``segmentation.json``.

    Args:
        student: the student to save; its `model` may be wrapped.
        directory: created if needed.
        classes: names in the order of the logits.
        preprocess: preprocessing to save; None: that of the student.

    Raises:
        KtrayError: the numbers of names and logits differ, or an argument of the model cannot be saved as JSON.
    """
    model = unwrap(student.model)
    assert isinstance(model, SegmenterNet)
    if model.num_classes != len(classes):
        raise KtrayError(
            f"The student has {model.num_classes} logits for {len(classes)} classes", "Use one class name per logit."
        )
    p = preprocess or student.preprocess
    save_student(Student(model.backbone, student.name, student.kwargs, p, []), directory, [])
    folder = Path(directory)
    save_file(plain(model.head), str(folder / "head.safetensors"))
    facts = {
        "format": _FORMAT,
        "head": model.kind,
        "width": model.width,
        "classes": list(classes),
        "preprocess": p.to_dict(),
    }
    (folder / FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def load_segmenter(directory: str | Path, device: str | torch.device = "cpu") -> Segmenter:
    """Load a segmentation student that `save_segmenter` wrote, in evaluation mode.

    Raises:
        KtrayError: the folder contains no segmentation student, or its weights are damaged or do not fit.
    """
    folder = Path(directory)
    try:
        facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
        classes, kind, width = facts["classes"], facts["head"], facts["width"]
        preprocess = Preprocess.from_dict(facts["preprocess"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KtrayError(
            f"'{folder}' contains no segmentation student: {cause(error)}", "Use the folder student/ of a run."
        ) from error
    plain = load_student(folder)
    model = SegmenterNet(plain.model, kind, len(classes), preprocess.size, width)
    fill(model.head, folder / "head.safetensors")
    return Segmenter(model, plain.name, plain.kwargs, preprocess, classes).eval().to(device)
