"""Load the student of a run, of any task kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ktray.models.student import classifier_io
from ktray.models.student.classifier import Student
from ktray.recipe.registries import TASKS
from ktray.tasks.base import TaskKind


def load_student(directory: str | Path, device: str | torch.device = "cpu") -> Student:
    """Load the student of a run folder, in evaluation mode: a classifier, a segmenter, or a student of another task
    kind.

    Args:
        directory: the folder ``student/`` of a run.
        device: the device of the student.

    Raises:
        KtrayError: the folder has no student, or its weights are damaged or do not fit the model.
    """
    for kind in marked_kinds(lambda name: (Path(directory) / name).is_file()):
        return kind.load_student(directory, device)
    return classifier_io.load_student(directory, device)


def marked_kinds(exists: Callable[[str], bool]) -> list[TaskKind]:
    """The task kinds whose file `ktray.tasks.base.TaskKind.student_file` is in the folder of a student: none or one.

    Args:
        exists: a function of a file name: whether the folder has such a file.
    """
    return [kind for _, kind in TASKS if kind.student_file and exists(kind.student_file)]
