"""The contract of a task kind: what is predicted for an image, and all that follows from it.

A kind is one instance, registered under the name that ``task.kind`` chooses:

    TASKS.register("regression")(Regression())

Everything outside of this folder asks the kind and never compares its name: which labels are read and how they are
stored, what ADAPT fits and what the student is, the loss on labels, how predictions are matched, which counts a
validation or a test image adds and what scores they make, what the report shows, and whether jobs/export.py can ship
the student. Most methods have a default that suits a kind whose model gives one vector for an image; the abstract ones
are those that no default suits. A kind imports no Ray, has no state and can be pickled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch

from ktray.data.augment import random_views
from ktray.data.labelled.decode import LabelReader, NumberReader
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.preprocess import Preprocess
from ktray.data.views import ViewPolicy
from ktray.errors import KtrayError
from ktray.models.student.classifier import Student, build_student
from ktray.models.student.classifier_io import load_student, save_student
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.teacher import Teacher
from ktray.objectives.matching import Matching
from ktray.recipe.registries import TASKS
from ktray.recipe.schema import StudentConfig, TaskConfig, TeacherConfig
from ktray.reporting.worst import WorstError
from ktray.storage.columns import Rows
from ktray.tasks.weighted import WeightedCounts, WeightedScores

# Pictures of errors in a report.
WORST = 24


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled images as ADAPT sees them.

    Attributes:
        pixels: reads them: (N, 3, H, W) uint8, in the teacher's geometry.
        embedding: (N, D) float32 by the frozen tower, not of unit length.
        targets: what `TaskKind.targets` makes of the stored labels.
    """

    pixels: Callable[[], np.ndarray]
    embedding: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class HeadSettings:
    """What fitting a teacher's heads depends on beside the images.

    Attributes:
        classes: names in the order of the outputs; ``names`` are the same as text, ``prompts`` templates for them.
        wanted: the candidates of `TaskKind.candidates`.
        levels: teacher.levels.
    """

    classes: list[str]
    names: list[str]
    prompts: list[str]
    wanted: list[str]
    levels: int


@dataclass(frozen=True)
class FittedHeads:
    """Adapted teachers by the candidate's name, their scores on validation as `TaskKind.calibrate` gives them, and the
    FLOPs of it all beyond one embedding of every image."""

    teachers: dict[str, AdaptedTeacher]
    scores: dict[str, dict[str, float]]
    flops: float


@dataclass(frozen=True)
class TestSet:
    """A tested student, for the pictures of its errors.

    Attributes:
        rows: those of EVALUATE, all shards together.
        task: the labelled images; ``reader`` reads their labels at full size.
        student: makes the student, in evaluation mode on the CPU.
    """

    rows: Rows
    task: LabelledSet
    reader: LabelReader
    student: Callable[[], Student]
    max_pixels: int


class TaskKind(ABC):
    """A task kind; see the module's text.

    Attributes:
        metrics: what a model can be judged on, fractions, higher is better: name -> what it is in words. The first one
            is taken for task.metric=auto.
        matching: how the objectives match predictions.
        image_classes: each image has one class, out of ``LabelledSet.classes``. Then queries have a class, and the
            teacher's head gives class probabilities of gallery images.
        linear_student: the student's last layer is a linear one, which `student_head` can set.
        teacher_form: the class of the adapted teacher.
        student_file: a file that marks a saved student as one of this kind; empty: plain timm files alone.
        embed_batch, test_batch: images that the teacher embeds, and a model is tested on, at once.
        worst_title: what the report says above the pictures of errors, a sentence; empty: its own.
        worst_value: what the number beside such a picture is, in words; empty: the student's confidence.
        no_export: why jobs/export.py cannot ship a run of this kind (what follows "Run 'ID'"), and what to do instead;
            None: it can.
    """

    metrics: ClassVar[Mapping[str, str]]
    matching: ClassVar[Matching]
    image_classes: ClassVar[bool] = False
    linear_student: ClassVar[bool] = False
    teacher_form: ClassVar[type[AdaptedTeacher]] = AdaptedTeacher
    student_file: ClassVar[str] = ""
    embed_batch: ClassVar[int] = 256
    test_batch: ClassVar[int] = 256
    worst_title: ClassVar[str] = ""
    worst_value: ClassVar[str] = ""
    no_export: ClassVar[tuple[str, str] | None] = (
        "is of a task kind that jobs/export.py cannot export",
        "ktray.load_student(FOLDER) loads it.",
    )

    @property
    def key(self) -> str:
        """The name that it is registered under. It stands for the kind in a stage's key: a kind has no state."""
        return next(name for name, kind in TASKS if type(kind) is type(self))

    # Labels.

    @abstractmethod
    def read(self, data: str, part: TaskConfig) -> LabelledSet:
        """The labelled images in ``data`` (a path or uri), as the recipe's section describes them.

        ``LabelledSet.classes`` has one name for each output of the model.

        Raises:
            KtrayError: they cannot be read, or a key of the section does not go with this kind.
        """

    def reader(self, task: LabelledSet, whole: bool = False) -> LabelReader:
        """How labels are read and stored.

        Args:
            whole: for EVALUATE, in place of LABELS: labels of pixels are kept at the image's own size.
        """
        return NumberReader()

    def label_column(self, pixels: str) -> str:
        """The column of LABELS that belongs to the column ``pixels`` (``pixels`` or ``canvas``)."""
        return "label"

    def targets(self, stored: np.ndarray) -> torch.Tensor:
        """Labels for training, from the stored column of N images: (N, ...)."""
        return torch.from_numpy(stored.copy())

    def random_views(
        self, images: torch.Tensor, targets: torch.Tensor, policy: ViewPolicy, keys: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A random view of each image, and the targets of the views; see `ktray.data.augment.random_views`."""
        return random_views(images, policy, keys, size=size), targets

    # Training and scores.

    @abstractmethod
    def loss(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of the model's output (N, ...) float32 on labels, a scalar."""

    @abstractmethod
    def tally(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What N images add to a validation: (K + 2,) float64: the counts that `scores` takes, then the sum of the loss
        and the number of labels that it is the sum over. Tallies of parts are added up."""

    @abstractmethod
    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """Every metric, from the summed counts (K,) of any number of images; the only place where scores are made."""

    # Teacher.

    def candidates(self, part: TeacherConfig, has_text: bool) -> list[str]:
        """What ADAPT tries, in order: some of ``text``, ``probe`` and ``finetune``; by default all but ``text``, which
        needs a head from the classes' names.

        Raises:
            KtrayError: teacher.adapt asks for what this kind or teacher does not have.
        """
        wanted: list[str] = list(part.candidates) if part.adapt == "auto" else [part.adapt]
        if wanted == ["text"]:
            raise KtrayError("teacher.adapt=text is for classification", "Set teacher.adapt=probe.")
        return [name for name in wanted if name != "text"]

    def teacher_preprocess(self, preprocess: Preprocess) -> Preprocess:
        """How the teacher sees the task's images; by default as it sees any."""
        return preprocess

    def head_key(self, part: TeacherConfig) -> Any:
        """JSON-like: what `fit_heads` reads of the section and no other kind's does; it enters ADAPT's key."""
        return None

    @abstractmethod
    def fit_heads(
        self, teacher: Teacher, train: LabelledSplit, val: LabelledSplit, settings: HeadSettings
    ) -> FittedHeads:
        """Heads on the frozen tower, fitted to ``train`` and calibrated on ``val``."""

    @abstractmethod
    def calibrate(self, out: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, float]]:
        """The temperature to divide a teacher's raw predictions on validation by (1 where there is none), and the
        scores and ``loss`` that they have then."""

    def positions(self, size: int) -> int:
        """About how many predictions the teacher stores of a view of ``size`` pixels a side."""
        return 1

    # Student.

    def student_options(self, part: StudentConfig) -> dict[str, Any]:
        """What `build_student` reads of the section beside its name, arguments and weights."""
        return {}

    def build_student(
        self,
        name: str,
        kwargs: dict[str, Any],
        outputs: int,
        image_size: int,
        pretrained: bool = False,
        checkpoint: str | None = None,
        **options: Any,
    ) -> Student:
        """The student, with its facts; by default a timm model with ``outputs`` outputs."""
        return build_student(name, kwargs, outputs, image_size, pretrained, checkpoint)

    def student_head(
        self, train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], outputs: int
    ) -> LinearHead:
        """A linear head on a pretrained student's features of unit length, where `linear_student` is true.

        Args:
            train, val: pooled features (N, F) of any length, and targets.
        """
        raise NotImplementedError

    def save_student(self, student: Student, folder: Path, classes: Sequence[str]) -> None:
        """Write the student's folder."""
        save_student(student, folder, classes)

    def load_student(self, folder: str | Path, device: str | torch.device = "cpu") -> Student:
        """The student that `save_student` wrote, in evaluation mode."""
        return load_student(folder, device)

    # Test and report.

    @abstractmethod
    def test_rows(self, out: np.ndarray, columns: Rows) -> tuple[Rows, Any]:
        """What EVALUATE stores of one model's predictions.

        Args:
            out: (N, ...) float32, the model's output.
            columns: what `reader` with ``whole`` gave for the N images.

        Returns:
            Columns by suffix (they are stored under the model's name and the suffix), and JSON-like counts that
            `confusion` adds up, kept for the student alone; None where there are none.
        """

    @abstractmethod
    def image_counts(self, rows: Rows, model: str) -> np.ndarray:
        """(N, K): the counts that `scores` takes, of each test image by itself, from the rows that EVALUATE stored."""

    def test_metrics(self, rows: Rows, model: str, classes: list[str]) -> dict[str, Any]:
        """`scores` of one model on all test images, with ``per_class`` (name -> fraction or None; empty where there is
        none) and ``n``, the number of images."""
        counts = self.image_counts(rows, model)
        return {**self.scores(counts.sum(0)), "per_class": {}, "n": len(counts)}

    def weighted_scores(self, metric: str, seeds: Sequence[Rows]) -> WeightedScores:
        """The student's test rows of several seeds, in the same order of images, ready to be scored under weights."""
        counts = np.stack([self.image_counts(rows, "student") for rows in seeds])
        return WeightedCounts(counts.astype(np.float64), self.scores, metric)

    def test_columns(self, columns: Rows) -> Rows:
        """What EVALUATE stores of the labels beside the models' columns."""
        return {"label": columns["label"]}

    def confusion(self, rows: Rows, counts: Sequence[Any], classes: list[str]) -> np.ndarray | None:
        """(C, C) counts of the student on test, rows are true classes, columns predictions; None where there are none.

        Args:
            counts: the second results of `test_rows`, of all shards.
        """
        return None

    def worst(self, tested: TestSet) -> list[WorstError]:
        """At most `WORST` errors of the student on test, worst first; images that cannot be read are left out."""
        return []


def metric_label(name: str) -> str:
    """A metric in words, whichever task kind has it; its name where none does."""
    return next((kind.metrics[name] for _, kind in TASKS if name in kind.metrics), name)


def task_kind(name: str) -> TaskKind:
    """The task kind that ``task.kind`` names.

    Raises:
        KtrayError: there is none; the message names the nearest.
    """
    return cast(TaskKind, TASKS.get(name))
