"""Students of any task kind, as a run leaves them."""

from __future__ import annotations

from pathlib import Path

import torch

from ktray.models.student import classifier_io
from ktray.models.student.classifier import Student
from ktray.recipe.registries import TASKS


def load_student(directory: str | Path, device: str | torch.device = "cpu") -> Student:
    """The student of a run folder, in evaluation mode: a classifier, a segmenter, or that of another task kind.

    Args:
        directory: a run's ``student/`` folder.
        device: where to put it.

    Raises:
        KtrayError: the folder is not one, or its weights are damaged or do not fit.
    """
    for _, kind in TASKS:
        if kind.student_file and (Path(directory) / kind.student_file).is_file():
            student: Student = kind.load_student(directory, device)
            return student
    return classifier_io.load_student(directory, device)
