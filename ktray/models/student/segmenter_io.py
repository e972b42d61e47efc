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
        student: what to save; its `model` may be wrapped.
        directory: created if needed.
        classes: names in the order of the logits.
        preprocess: the student's own if None.

    Raises:
        KtrayError: as many names as logits are needed, and arguments that JSON can hold.
    """
    model = unwrap(student.model)
    assert isinstance(model, SegmenterNet)
    if model.num_classes != len(classes):
        raise KtrayError(f"The student has {model.num_classes} logits for {len(classes)} classes", "Name each.")
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
    """A segmentation student in evaluation mode, as `save_segmenter` left it.

    Raises:
        KtrayError: the folder is not one, or its weights are damaged or do not fit.
    """
    folder = Path(directory)
    try:
        facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
        classes, kind, width = facts["classes"], facts["head"], facts["width"]
        preprocess = Preprocess.from_dict(facts["preprocess"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KtrayError(
            f"'{folder}' holds no segmentation student: {cause(error)}", "Give a run's student/ folder."
        ) from error
    plain = load_student(folder)
    model = SegmenterNet(plain.model, kind, len(classes), preprocess.size, width)
    fill(model.head, folder / "head.safetensors")
    return Segmenter(model, plain.name, plain.kwargs, preprocess, classes).eval().to(device)
