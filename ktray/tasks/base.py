"""The contract of a task kind, which defines what is predicted for an image.

A kind is one instance, registered under the value of ``task.kind`` that chooses it:

    TASKS.register("regression")(Regression())

Code outside of this folder calls the methods of the kind and never compares its name. The kind defines how labels are
read and stored, which heads ADAPT fits, how the student is built, the loss on labels, how predictions are matched, the
counts of an image in validation and test and the scores that follow from them, the errors in the report, and whether
jobs/export.py can export the student. Most methods have a default for kinds whose model outputs one vector for each
image; methods without a useful default are abstract. A kind does not import Ray, has no state and is picklable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# Number of errors that a report shows.
WORST = 24


@dataclass(frozen=True)
class LabelledSplit:
    """The labelled images of a split, for ADAPT.

    Attributes:
        pixels: a function that reads the images, in the teacher's geometry and in order, in arrays (n, 3, H, W) uint8
            of a few hundred images.
        embedding: (N, D) float32 embeddings by the frozen tower, not of unit length.
        targets: the output of `TaskKind.targets` for the stored labels.
    """

    pixels: Callable[[], Iterator[np.ndarray]]
    embedding: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class HeadSettings:
    """The settings for fitting a teacher's heads.

    Attributes:
        classes: class names, in the order of the outputs.
        names: class names as text for prompts.
        prompts: templates for the names.
        wanted: the candidates of `TaskKind.candidates`.
        levels: value of ``teacher.levels``.
    """

    classes: list[str]
    names: list[str]
    prompts: list[str]
    wanted: list[str]
    levels: int


@dataclass(frozen=True)
class FittedHeads:
    """Adapted teachers by name of the candidate, their scores on validation (see `TaskKind.calibrate`), and the FLOPs
    of fitting, without the FLOPs of one embedding of each image."""

    teachers: dict[str, AdaptedTeacher]
    scores: dict[str, dict[str, float]]
    flops: float


@dataclass(frozen=True)
class TestSet:
    """A tested student, to find its errors.

    Attributes:
        rows: the rows of all shards of EVALUATE.
        task: the labelled images.
        reader: reads their labels at full size.
        student: a function that loads the student, in evaluation mode on the CPU.
        max_pixels: size of the largest image that is decoded, in pixels.
    """

    rows: Rows
    task: LabelledSet
    reader: LabelReader
    student: Callable[[], Student]
    max_pixels: int


class TaskKind(ABC):
    """A task kind; see the docstring of the module.

    Attributes:
        metrics: the metrics of the kind, which are fractions (higher is better), as name -> name in words. The first
            one is that of ``task.metric=auto``.
        matching: how objectives match predictions.
        image_classes: whether each image has one class of ``LabelledSet.classes``. Then queries have a class, and the
            teacher's head predicts class probabilities of gallery images.
        label_sets: whether each image has a set of these classes, and its label is (C,), 1 for each class of the set.
            Then queries are balanced over the classes.
        ranked: whether scores depend on the order of the outputs of all images, so that counts of parts of a split
            cannot be added. Then `tally` is called with all images of a split.
        decides: whether decisions need values that are fitted on validation after training, such as thresholds. Then
            EVALUATE predicts the validation images, too, and calls `fit_decisions` and `decide`.
        linear_student: whether the student's last layer is linear, so that `student_head` can set it.
        teacher_form: class of the adapted teacher.
        student_file: name of the file that marks a saved student of this kind; empty: its folder has only the files of
            a plain timm model.
        embed_batch, test_batch: batch sizes for the teacher's embeddings, and for tests.
        worst_title: the sentence above the errors in the report; empty: the default of the report.
        worst_value: name of the number of an error, in words; empty: it is the student's confidence.
        no_export: why jobs/export.py cannot export a run of this kind (the text after "Run 'ID'"), and what to do
            instead; None: it can.
    """

    metrics: ClassVar[Mapping[str, str]]
    matching: ClassVar[Matching]
    image_classes: ClassVar[bool] = False
    label_sets: ClassVar[bool] = False
    ranked: ClassVar[bool] = False
    decides: ClassVar[bool] = False
    linear_student: ClassVar[bool] = False
    teacher_form: ClassVar[type[AdaptedTeacher]] = AdaptedTeacher
    student_file: ClassVar[str] = ""
    embed_batch: ClassVar[int] = 256
    test_batch: ClassVar[int] = 256
    worst_title: ClassVar[str] = ""
    worst_value: ClassVar[str] = ""
    no_export: ClassVar[tuple[str, str] | None] = (
        "has a task kind that jobs/export.py cannot export",
        "Load the student with ktray.load_student(FOLDER).",
    )

    @property
    def key(self) -> str:
        """The name under which the kind is registered. As a kind has no state, the name represents it in keys of
        stages."""
        return next(name for name, kind in TASKS if type(kind) is type(self))

    # Labels.

    @abstractmethod
    def read(self, data: str, part: TaskConfig) -> LabelledSet:
        """Read the labelled images in ``data`` (a path or uri), as the recipe section ``task`` describes them.

        ``LabelledSet.classes`` has one name for each output of the model.

        Raises:
            KtrayError: the images cannot be read, or this kind does not support a key of the section.
        """

    def reader(self, task: LabelledSet, whole: bool = False) -> LabelReader:
        """How labels are read and stored.

        Args:
            whole: False for LABELS; True for EVALUATE, which keeps labels of pixels at the size of the image.
        """
        return NumberReader()

    def classes_of(self, label: Any) -> Sequence[int]:
        """The classes in the label of an example (`ktray.data.labelled.labelled_set.LabelledExample.label`)."""
        return [label] if self.image_classes else []

    def label_column(self, pixels: str) -> str:
        """The name of the label column in LABELS for the image column ``pixels`` (``pixels`` or ``canvas``)."""
        return "label"

    def targets(self, stored: np.ndarray) -> torch.Tensor:
        """Targets for training (N, ...), from the stored label column of N images."""
        return torch.from_numpy(stored.copy())

    def random_views(
        self, images: torch.Tensor, targets: torch.Tensor, policy: ViewPolicy, keys: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A random view of each image, and the targets of the views; see `ktray.data.augment.random_views`."""
        return random_views(images, policy, keys, size=size), targets

    # Training and scores.

    @abstractmethod
    def loss(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of the model's output (N, ...) float32 with the targets, a scalar."""

    @abstractmethod
    def tally(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The counts of N images in validation, (K + 2,) float64: the counts for `scores`, the sum of the loss, and the
        number of labels in that sum. The tallies of several batches are added, unless the kind is `ranked`."""

    @abstractmethod
    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """All metrics, from the summed counts (K,) of any number of images. Scores are computed nowhere else."""

    # Teacher.

    def candidates(self, part: TeacherConfig, has_text: bool) -> list[str]:
        """The candidates of ADAPT, in order, out of ``text``, ``probe``, ``finetune`` and ``lora``. By default
        ``text``, which needs a head from class names, is not among them.

        Raises:
            KtrayError: this kind or teacher does not support teacher.adapt.
        """
        wanted: list[str] = list(part.candidates) if part.adapt == "auto" else [part.adapt]
        if wanted == ["text"]:
            raise KtrayError("teacher.adapt=text needs a classification task", "Set teacher.adapt=probe.")
        return [name for name in wanted if name != "text"]

    def teacher_preprocess(self, preprocess: Preprocess) -> Preprocess:
        """The teacher's preprocessing for images of the task; by default that for all images."""
        return preprocess

    def head_key(self, part: TeacherConfig) -> Any:
        """JSON-like values of the section that `fit_heads` of this kind reads in addition. They are part of ADAPT's
        key."""
        return None

    @abstractmethod
    def fit_heads(
        self, teacher: Teacher, train: LabelledSplit, val: LabelledSplit, settings: HeadSettings
    ) -> FittedHeads:
        """Fit heads on the frozen tower to ``train``, and calibrate them on ``val``."""

    @abstractmethod
    def calibrate(self, out: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, float]]:
        """The temperature for a teacher's raw predictions, fitted on validation (1 if the kind has none), and the
        scores and ``loss`` of the predictions after division by it."""

    def positions(self, size: int) -> int:
        """The approximate number of teacher predictions for a view with a side of ``size`` pixels."""
        return 1

    # Student.

    def student_options(self, part: StudentConfig) -> dict[str, Any]:
        """Values of the section that `build_student` reads in addition to name, arguments and weights."""
        return {}

    def build_student(
        self,
        name: str,
        kwargs: dict[str, Any],
        outputs: int,
        image_size: int,
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        **options: Any,
    ) -> Student:
        """Build the student; by default a timm model with ``outputs`` outputs."""
        return build_student(name, kwargs, outputs, image_size, pretrained, checkpoint)

    def student_head(
        self, train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], outputs: int
    ) -> LinearHead:
        """Fit a linear head on the unit-length features of a pretrained student, if `linear_student` is true.

        Args:
            train, val: pooled features (N, F) of any length, and targets.
        """
        raise NotImplementedError

    def save_student(self, student: Student, folder: Path, classes: Sequence[str]) -> None:
        """Write the student into a folder."""
        save_student(student, folder, classes)

    def load_student(self, folder: str | Path, device: str | torch.device = "cpu") -> Student:
        """Load a student that `save_student` has written, in evaluation mode."""
        return load_student(folder, device)

    # Test and report.

    @abstractmethod
    def test_rows(self, out: np.ndarray, columns: Rows) -> tuple[Rows, Any]:
        """The values that EVALUATE stores for the predictions of one model.

        Args:
            out: (N, ...) float32, the model's output.
            columns: columns of the N images by `reader` with ``whole``.

        Returns:
            Columns by suffix, which are stored under the name of the model with the suffix; and JSON-like counts for
            `confusion`, which are stored only for the student, or None.
        """

    def fit_decisions(self, rows: Rows, model: str, classes: list[str]) -> dict[str, dict[str, float]]:
        """What `decide` needs, fitted on validation: by name, a value for each class.

        Args:
            rows: the columns of `test_rows` and `test_columns` for the validation images; there may be none.
        """
        return {}

    def decide(self, out: np.ndarray, fitted: dict[str, dict[str, float]]) -> Rows:
        """The columns by suffix that the decisions add to those of `test_rows`.

        Args:
            out: (N, ...) float32, the model's output.
            fitted: the result of `fit_decisions` for the model.
        """
        return {}

    def with_decisions(self, student: Student, fitted: dict[str, dict[str, float]]) -> Student:
        """The student with the result of `fit_decisions`, so that `save_student` stores it."""
        return student

    def exported_output(self, logits: np.ndarray, columns: Rows) -> np.ndarray:
        """What `exported_metrics` needs of the logits of a batch; by default the logits.

        Args:
            logits: (N, ...) float32.
            columns: the columns of the reader ``reader(task, whole=True)``.
        """
        return logits

    def exported_metrics(self, student: Student, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """`test_metrics` of an exported file of the student, for kinds without `no_export`.

        Args:
            outputs: the results of `exported_output` for all batches, concatenated.
            labels: the column ``label`` of `reader` for the images.
        """
        raise NotImplementedError

    def compact(self, rows: Rows) -> Rows:
        """What the methods below need of the rows that EVALUATE stores. It is applied to each shard, so that memory
        does not grow with images times classes. By default all columns."""
        return rows

    @abstractmethod
    def image_counts(self, rows: Rows, model: str) -> np.ndarray:
        """Counts (N, K) for `scores`, one row for each test image, from the rows of `compact`."""

    def test_metrics(self, rows: Rows, model: str, classes: list[str]) -> dict[str, Any]:
        """`scores` of one model on all test images, with ``per_class`` (name -> fraction or None; empty if the kind has
        no classes), ``n``, the number of images, and, if the kind has more figures for each class, ``details`` (name ->
        figure -> number or None)."""
        counts = self.image_counts(rows, model)
        return {**self.scores(counts.sum(0)), "per_class": {}, "n": len(counts)}

    def weighted_scores(self, metric: str, seeds: Sequence[Rows]) -> WeightedScores:
        """The student's test rows of several seeds, in the same order of images, for scores under weights."""
        counts = np.stack([self.image_counts(rows, "student") for rows in seeds])
        return WeightedCounts(counts.astype(np.float64), self.scores, metric)

    def test_columns(self, columns: Rows) -> Rows:
        """The label columns that EVALUATE stores."""
        return {"label": columns["label"]}

    def confusion(self, rows: Rows, counts: Sequence[Any], classes: list[str]) -> np.ndarray | None:
        """Confusion counts (C, C) of the student on test, with true classes as rows and predicted classes as columns;
        None if the kind has none.

        Args:
            counts: the counts of `test_rows` for all shards.
        """
        return None

    def calibration(self, rows: Rows) -> dict[str, Any] | None:
        """The honesty of the student's probabilities on test, as `ktray.tasks.calibration.calibration` returns it; None
        if the kind predicts no class for an image."""
        return None

    def worst(self, tested: TestSet) -> list[WorstError]:
        """At most `WORST` errors of the student on test, worst first. Images that cannot be read are left out."""
        return []


def metric_label(name: str) -> str:
    """A metric of any task kind in words; its name if no kind has it."""
    return next((kind.metrics[name] for _, kind in TASKS if name in kind.metrics), name)


def task_kind(name: str) -> TaskKind:
    """The task kind that ``task.kind`` names.

    Raises:
        KtrayError: there is no such kind; the message names the nearest one.
    """
    return cast(TaskKind, TASKS.get(name))
