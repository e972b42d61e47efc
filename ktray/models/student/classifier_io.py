"""Classification students on disk, in a format that ``timm.create_model("local-dir:DIR", pretrained=True)`` loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.messages import cause
from ktray.models.student.classifier import Student
from ktray.models.weights import load_timm_weights, plain

# The entries of a model's own config that timm needs to load, resize or finetune the model.
_KEPT = ("first_conv", "classifier", "fixed_input_size", "pool_size", "min_input_size")


def save_student(
    student: Student,
    directory: str | Path,
    classes: Sequence[str],
    preprocess: Preprocess | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``.

    Weights are saved without wrappers (Student, DDP, ``torch.compile``): the keys are those of the plain timm model.

    Args:
        student: the student to save; its `model` may be wrapped.
        directory: created if needed.
        classes: names in the order of the logits.
        preprocess: preprocessing to save; None: that of the student.

    Raises:
        KtrayError: the numbers of names and logits differ, or an argument of the model cannot be saved as JSON.
    """
    model = unwrap(student.model)
    p = preprocess or student.preprocess
    num_classes = int(getattr(model, "num_classes", len(classes)))
    if num_classes != len(classes):
        raise KtrayError(
            f"The student has {num_classes} logits for {len(classes)} classes", "Use one class name per logit."
        )
    own: Any = getattr(model, "pretrained_cfg", {})
    config = {
        "architecture": student.name.partition(".")[0],
        "num_classes": num_classes,
        "num_features": student.feature_dim,
        "label_names": list(classes),  # where the loaders of timm's hub and of transformers look for them
        "pretrained_cfg": {
            **{key: own[key] for key in _KEPT if own.get(key) is not None},
            **p.timm_config(),
            "num_classes": num_classes,
            "label_names": list(classes),
        },
        "model_args": student.kwargs,
    }
    try:
        text = json.dumps(config, indent=1, ensure_ascii=False)
    except TypeError as error:
        raise KtrayError(
            f"student.kwargs cannot be saved: {error}", "Use only numbers, texts, lists and null."
        ) from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain(model), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_student(directory: str | Path, device: str | torch.device = "cpu") -> Student:
    """Load a student that `save_student` wrote, in evaluation mode.

    Raises:
        KtrayError: the folder contains no student, or its weights are damaged or do not fit.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, kwargs = config["architecture"], config.get("model_args", {})
        classes = config["pretrained_cfg"]["label_names"]
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:
        raise KtrayError(
            f"'{folder}' contains no student: {cause(error)}",
            "Use the folder student/ of a run (config.json, weights).",
        ) from error
    load_timm_weights(model, folder / "model.safetensors", "the student's folder", keep_head=True)
    preprocess = Preprocess.from_timm(model)
    return Student(model, name, kwargs, preprocess, classes).eval().to(device)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers of ``torch.compile`` and DDP."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner
