"""Load the student of a run, of any task kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ktray.models.device import device as own_device
from ktray.models.features import is_convolutional
from ktray.models.student import classifier_io
from ktray.models.student.classifier import Student
from ktray.recipe.registries import TASKS
from ktray.storage.store import Dir
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


@dataclass(frozen=True)
class StudentInFolder:
    """A picklable description of the student in a folder, which workers load.

    Attributes:
        directory: the folder ``student/`` of a run, local or in a bucket.
    """

    directory: Dir

    def identity(self) -> str:
        """A hash of the description and of the weights."""
        files = (self.directory.read(file) for file in ("config.json", "model.safetensors"))
        return "-".join(hashlib.sha256(content).hexdigest()[:32] for content in files)

    def load(self) -> Student:
        """Load the student on the device of this process, in evaluation mode."""
        with self.directory.local() as folder:
            student = load_student(folder, own_device())
        if is_convolutional(student.model):  # a third faster on CPUs, as for teachers
            student.model.to(memory_format=torch.channels_last)
        return student
