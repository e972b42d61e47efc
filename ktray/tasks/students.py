"""Students of any task kind, as a run leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ktray.models.student import classifier_io
from ktray.models.student.classifier import Student
from ktray.recipe.registries import TASKS
from ktray.tasks.base import TaskKind


def load_student(directory: str | Path, device: str | torch.device = "cpu") -> Student:
    """The student of a run folder, in evaluation mode: a classifier, a segmenter, or that of another task kind.

    Args:
        directory: a run's ``student/`` folder.
        device: where to put it.

    Raises:
        KtrayError: the folder is not one, or its weights are damaged or do not fit.
    """
    for kind in marked_kinds(lambda name: (Path(directory) / name).is_file()):
        return kind.load_student(directory, device)
    return classifier_io.load_student(directory, device)


def marked_kinds(exists: Callable[[str], bool]) -> list[TaskKind]:
    """The task kinds whose mark (`ktray.tasks.base.TaskKind.student_file`) a student's folder holds: none or one.

    Args:
        exists: whether the folder has a file of this name.
    """
    return [kind for _, kind in TASKS if kind.student_file and exists(kind.student_file)]
